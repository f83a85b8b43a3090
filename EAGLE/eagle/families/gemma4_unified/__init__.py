"""Gemma 4 without an encoder of pictures."""
