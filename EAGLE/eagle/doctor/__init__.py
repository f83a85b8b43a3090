"""What `msd doctor` looks at: packages, machine, checkpoints, hub, pictures. Nothing here loads a model's weights."""
