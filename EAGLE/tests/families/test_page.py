"""The page of families is what the registry says."""

from __future__ import annotations

import pytest
from repository import REPO

from eagle.families.page import page


def test_the_page_is_up_to_date() -> None:
    try:
        expected = page()
    except ImportError as error:
        pytest.skip(f"this release of transformers lacks a family: {error}")
    assert (REPO / "docs/families.md").read_text(encoding="utf-8") == expected


def test_the_readme_leads_to_the_page() -> None:
    assert "(docs/families.md)" in (REPO / "README.md").read_text(encoding="utf-8")
