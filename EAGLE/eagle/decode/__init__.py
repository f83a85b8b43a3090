"""The decoding engine: draft, verify, accept, commit."""
