"""One-off studies, run from the repository root: `python -m experiments.NAME --help`."""
