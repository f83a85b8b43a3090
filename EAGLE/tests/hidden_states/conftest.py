"""Fixtures of the tests of data generation."""

from corpus_support import annotations, any_base, any_target, base, llava, pictures, server, target, waits

__all__ = ["annotations", "any_base", "any_target", "base", "llava", "pictures", "server", "target", "waits"]
