"""Stored hidden states: the contract between data generation and training."""
