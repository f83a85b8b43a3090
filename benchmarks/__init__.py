"""Measurements: the suite of contestants, the real size on random weights, the draft's head."""
