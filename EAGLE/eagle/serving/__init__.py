"""What serving engines need: drafts and base models in their formats, and the command that starts vLLM."""
