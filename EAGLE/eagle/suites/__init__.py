"""Published sets of questions on which speculative decoding is measured, read from where they are published."""
