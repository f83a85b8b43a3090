"""A tiny but real LLaVA-1.5: data recipe, training, export and evaluation of `pocket/llava`."""
