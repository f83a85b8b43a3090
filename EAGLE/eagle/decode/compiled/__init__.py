"""Decoding through `torch.compile` with static shapes."""
