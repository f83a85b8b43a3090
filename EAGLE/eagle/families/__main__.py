"""Prints the page ``docs/families.md``."""

from __future__ import annotations

from eagle.families.page import page

if __name__ == "__main__":
    print(page(), end="")
