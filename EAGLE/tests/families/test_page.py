"""The page of families is what the registry says."""

from __future__ import annotations

import pytest
from repository import REPO

from eagle.families.__main__ import page


def test_the_page_is_up_to_date() -> None:
    try:
        expected = page()
    except ImportError as error:
        pytest.skip(f"this release of transformers lacks a family: {error}")
    assert (REPO / "docs/families.md").read_text(encoding="utf-8") == expected
