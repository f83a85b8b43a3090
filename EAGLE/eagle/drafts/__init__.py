"""Draft heads: configuration, checkpoints and the modules themselves."""
