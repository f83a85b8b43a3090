"""The plugin in vLLM's environment, without an engine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from repository import REPO

pytestmark = pytest.mark.by_hand

Python = Callable[[str], subprocess.CompletedProcess]


@pytest.fixture
def python(vllm_python: str, vllm_environment: dict[str, str], tmp_path: Path) -> Python:
    """Runs code in a fresh process of vLLM's environment."""
    environment = {**vllm_environment, "VLLM_LOGGING_LEVEL": "WARNING"}

    def run(code: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [vllm_python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


def test_vllm_finds_the_class_in_a_fresh_process(python: Python) -> None:
    done = python("""
from vllm.plugins import load_general_plugins
load_general_plugins()
import msd_vllm
msd_vllm.register()  # a second time
from vllm.model_executor.models import ModelRegistry
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
assert msd_vllm.ARCHITECTURE in ModelRegistry.get_supported_archs()
assert not hasattr(SpecDecodeBaseProposer.propose, "is_msd")
from transformers import Qwen2VLConfig
assert not hasattr(Qwen2VLConfig(), "image_token_index")
""")
    assert done.returncode == 0, done.stderr
    assert "msd-vllm" not in done.stderr  # this version is a tested one


def test_importing_the_package_imports_nothing_of_vllm(python: Python) -> None:
    done = python("import sys, msd_vllm; assert not {'vllm', 'torch', 'transformers'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_an_untested_version_is_one_line(python: Python) -> None:
    done = python("import vllm; vllm.__version__ = '0.99.1'; import msd_vllm; msd_vllm.register()")
    lines = [line for line in done.stderr.splitlines() if "msd-vllm" in line]
    assert done.returncode == 0 and len(lines) == 1, done.stderr
    assert "was tested with vLLM 0.32.0, this is 0.99.1" in lines[0]


def test_sampling_on_the_cpu_is_repaired_when_a_draft_asks_for_it(python: Python) -> None:
    done = python("""
import torch
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.sample import rejection_sampler
current_platform.register_triton_kernel_overrides()
load_general_plugins()
stock, values, ends = rejection_sampler.expand_batch_to_tokens, torch.tensor([0.0, 0.7]), torch.tensor([2, 5])
from msd_vllm.cpu_sampling import repair_sampling
assert rejection_sampler.expand_batch_to_tokens is stock
for _ in range(2):
    repair_sampling()
    found = rejection_sampler.expand_batch_to_tokens(values, ends.int(), 5, replace_from=0, replace_to=1)
    assert torch.equal(found, torch.tensor([1.0, 1.0, 0.7, 0.7, 0.7])), found
ids = rejection_sampler.expand_batch_to_tokens(torch.tensor([3, 9], dtype=torch.int32), ends.int(), 5)
assert ids.tolist() == [3, 3, 9, 9, 9] and ids.dtype == torch.int32

from types import SimpleNamespace
greedy_not = SimpleNamespace(all_greedy=False, temperature=torch.ones(1), top_k=torch.tensor([20]), top_p=None)
nothing = rejection_sampler.apply_sampling_constraints(torch.zeros(0, 8), torch.tensor([0]), greedy_not)
assert nothing.shape == (0, 8)  # no request of the step has drafted tokens

right = lambda x, ends, n: x.repeat_interleave(ends.diff(prepend=ends[:1] * 0))
rejection_sampler.expand_batch_to_tokens = right
repair_sampling()  # a vLLM without the fault is not changed
assert rejection_sampler.expand_batch_to_tokens is right
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("p.SpecDecodeBaseProposer.propose = lambda self, tokens: None", "propose does not take common_attn_metadata"),
        ("del p.SpecDecodeBaseProposer", "cannot import name 'SpecDecodeBaseProposer'"),
    ],
)
def test_another_proposer_is_one_clear_error(python: Python, change: str, words: str) -> None:
    done = python(f"""
import vllm.v1.spec_decode.llm_base_proposer as p
{change}
from msd_vllm.positions import use_plain_positions
use_plain_positions(object)
""")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "MSD drafts cannot be served: msd-vllm" in last and words in last, done.stderr


def test_a_vllm_without_a_layer_of_the_draft_is_one_clear_error(python: Python) -> None:
    done = python("""
import vllm.model_executor.models.interfaces as interfaces
del interfaces.SupportsMultiModalEmbeddings
import msd_vllm.model
""")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "ImportError: MSD drafts cannot be served: msd-vllm" in last, done.stderr
    assert "cannot import name 'SupportsMultiModalEmbeddings'" in last


def test_the_v2_runner_calls_the_class_with_what_it_takes(python: Python) -> None:
    """The V2 runner's own `_run_model`, without Triton and without an engine: the rows that reach the layer are
    features where pictures are and fused rows elsewhere, also in the step after, which has no pictures."""
    done = python("""
from contextlib import nullcontext
from types import SimpleNamespace
import torch
from torch import nn
from msd_vllm.model import EagleMSDForCausalLM
import vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator as v2

size, rows = 4, 6
draft = EagleMSDForCausalLM.__new__(EagleMSDForCausalLM)
nn.Module.__init__(draft)
draft.model = nn.Module()
draft.model.embed_tokens, draft.model.fc = nn.Embedding(9, size), nn.Linear(2 * size, size)
draft.model.layers = [lambda positions, rows, residual: (rows, torch.zeros_like(rows))]
draft.decoupled = True
draft.register_buffer("is_image", torch.zeros(16, dtype=torch.bool))
v2.set_forward_context = lambda *_, **__: nullcontext()
runner = SimpleNamespace(
    input_buffers=SimpleNamespace(input_ids=torch.arange(rows), positions=torch.arange(rows)), pcp_manager=None,
    vllm_config=None, supports_mm_inputs=True, inputs_embeds=torch.zeros(16, size), hidden_states=torch.randn(16, size),
    model=draft,
)
features, mask = [torch.randn(2, 3 * size)], torch.tensor([0, 1, 1, 0, 0, 0]).bool()  # as Qwen3-VL's: H of 3 H
run = v2.TargetDependentARSpeculator._run_model.__wrapped__
with torch.inference_mode():
    first, again = run(runner, rows, None, None, None, mm_inputs=(features, mask))
    text = draft.model.fc(torch.cat([draft.model.embed_tokens(torch.arange(rows)), runner.hidden_states[:rows]], -1))
    assert first is again
    assert torch.equal(first[1:3], features[0][:, :size])
    assert torch.allclose(first[[0, 3, 4, 5]], text[[0, 3, 4, 5]])
    step, _ = run(runner, rows, None, None, None)
    assert torch.allclose(step, text)
""")
    assert done.returncode == 0, done.stderr


def test_the_v2_runner_marks_the_row_before_each_picture_token(python: Python) -> None:
    """Row t of a draft is for token t + 1, also where a prompt is read in two pieces that cut a picture."""
    done = python("""
from types import SimpleNamespace
import numpy as np
import torch
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner

features = torch.randn(3, 4)
picture = SimpleNamespace(mm_position=PlaceholderRange(offset=2, length=3), identifier="one", modality="image")
runner = EncoderRunner.__new__(EncoderRunner)
runner.is_realtime = False
runner.encoder_cache = SimpleNamespace(mm_features={"r": [picture]}, encoder_outputs={"one": features})

def rows(computed, scheduled):
    found, mask = runner.gather_mm_embeddings(
        ["r"], scheduled, np.array([scheduled]), np.array([0, scheduled]), np.array([8]), np.array([computed]),
        draft_lookahead=1,
    )
    return mask.nonzero()[:, 0].tolist(), torch.cat(found) if found else None

places, found = rows(0, 3)  # tokens 1, 2, 3: the picture is at 2, 3 and 4
assert places == [1, 2] and torch.equal(found, features[:2])
places, found = rows(3, 5)
assert places == [0] and torch.equal(found, features[2:])
assert rows(8, 6) == ([], None)
""")
    assert done.returncode == 0, done.stderr


def test_pipeline_stages_are_refused_in_one_line(python: Python) -> None:
    done = python("""
from types import SimpleNamespace
from msd_vllm.model import EagleMSDForCausalLM
settings = {"family": "llava", "targets": ["llava"]}
draft = SimpleNamespace(msd=settings, hidden_size=8, vocab_size=9)
target = SimpleNamespace(
    hf_config=SimpleNamespace(model_type="llava"), get_hidden_size=lambda: 8, get_vocab_size=lambda: 9
)
EagleMSDForCausalLM(vllm_config=SimpleNamespace(
    speculative_config=SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=draft)),
    model_config=target, parallel_config=SimpleNamespace(pipeline_parallel_size=2),
))
""")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ValueError: MSD drafts cannot be served with pipeline"), (
        done.stderr
    )


def test_the_plugin_brings_no_package_and_moves_none(vllm_python: str, vllm_environment: dict[str, str]) -> None:
    """Uninstalled and installed again, without an index."""

    def pip(*arguments: str) -> list[str]:
        command = [vllm_python, "-m", "pip", *arguments]
        done = subprocess.run(command, env=vllm_environment, capture_output=True, text=True, check=True, cwd=REPO)
        return sorted(done.stdout.splitlines())

    install = ("install", "--quiet", "--no-index", "--no-build-isolation", "--editable", "./serving")
    pip(*install)
    with_plugin = pip("freeze")
    pip("uninstall", "--quiet", "--yes", "msd-vllm")
    without = pip("freeze")
    pip(*install)
    assert pip("freeze") == with_plugin
    added = [line for line in with_plugin if line not in without]
    assert without == [line for line in with_plugin if line not in added]
    assert all("msd-vllm" in line or line.endswith("/serving") or "serving" in line for line in added), added
