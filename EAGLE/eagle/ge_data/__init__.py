"""Training data: conversations go through the target once, its hidden states are stored in shards."""
