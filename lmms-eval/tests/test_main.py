"""Our models beside a plugin that fails on import: a distribution of its own, found as installed ones are."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import pytest

from lmms_eval_msd import MODELS
from lmms_eval_msd.__main__ import GROUP, load_plugins

BROKEN = 'raise RuntimeError("the licence server does not answer")\n'
HEALTHY = (
    "from lmms_eval.models.registry_v2 import ModelManifest\n"
    'manifest = ModelManifest(model_id="healthy", simple_class_path="healthy_plugin.Model")\n'
)


def install(folder, name, source, value):
    """A distribution with one plugin of lmms-eval, to be put on the path."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {name}:{value}\n")
    (folder / f"{name}.py").write_text(source)


@pytest.fixture
def broken_first(tmp_path, monkeypatch):
    install(tmp_path, "broken_plugin", BROKEN, "manifests")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("broken_plugin", "healthy_plugin"):
        sys.modules.pop(name, None)


@pytest.fixture
def warnings():
    import lmms_eval.models  # noqa: F401  its first import removes every sink
    from loguru import logger

    seen: list[str] = []
    sink = logger.add(seen.append, level="WARNING", format="{message}")
    yield seen
    logger.remove(sink)


def test_lmms_eval_stops_at_the_broken_one(broken_first, warnings):
    """Nothing of ours runs then; the message is lmms-eval's."""
    from lmms_eval.models import _initialize_model_registry

    assert next(point.name for point in entry_points(group=GROUP)) == "broken_plugin"
    registry = _initialize_model_registry()
    assert "llava_msd" not in registry.list_canonical_model_ids()
    assert any("the licence server does not answer" in line for line in warnings)


def test_ours_are_there_all_the_same(broken_first, warnings):
    from lmms_eval.models import _initialize_model_registry

    install(broken_first, "healthy_plugin", HEALTHY, "manifest")
    registry = _initialize_model_registry()
    warnings.clear()
    (name,) = load_plugins(registry)
    assert MODELS.keys() | {"healthy"} <= set(registry.list_canonical_model_ids())
    assert name == "'broken_plugin' (broken_plugin 1.0, broken_plugin:manifests)"
    assert len(warnings) == 1
    assert name in warnings[0]
    assert "RuntimeError: the licence server does not answer" in warnings[0]
    assert load_plugins(registry) == []


def test_nothing_to_load_plugins(warnings):
    from lmms_eval.models import MODEL_REGISTRY_V2

    assert load_plugins(MODEL_REGISTRY_V2) == []
    assert warnings == []
