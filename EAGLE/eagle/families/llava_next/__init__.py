"""LLaVA-1.6 (LLaVA-NeXT)."""
