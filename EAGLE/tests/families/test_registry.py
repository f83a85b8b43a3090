"""The registry of families: light to import, and its rows agree with the classes they name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eagle.families import FAMILIES, Family, Target, family_named, family_of
from eagle.families.template import Template
from llava.errors import UserError


def test_import_brings_neither_torch_nor_transformers() -> None:
    code = "import sys, eagle.families.registry; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_classes_of_a_family(family: Family) -> None:
    try:
        target = family.target_class()
    except ImportError as error:  # an older transformers; such models are refused when they are loaded
        pytest.skip(str(error))
    assert issubclass(target, Target) and target.family == family.name
    assert issubclass(family.template_class(), Template)


def test_names_are_unique() -> None:
    for names in (
        [family.name for family in FAMILIES],
        [name for family in FAMILIES for name in family.model_types],
        [family.training_name for family in FAMILIES],
        [family.eval_model for family in FAMILIES],
    ):
        assert len(set(names)) == len(names)


def test_family_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama"}')
    assert family_of(tmp_path) is family_named("llava")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="model_type 'mamba' is not supported as base model"):
        family_of(tmp_path)
    with pytest.raises(UserError, match="unknown family of models: mamba"):
        family_named("mamba")
