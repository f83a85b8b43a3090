"""MSD on a small language model that this project did not make: SmolLM2-135M-Instruct."""
