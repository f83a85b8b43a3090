"""Download of the annotation files and picture sets."""
