"""Adaptive trees: depth and size follow from measured costs."""
