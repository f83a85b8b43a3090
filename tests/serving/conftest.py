"""vLLM with an MSD draft: engines run in processes of vLLM's own environment, references in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repository import REPO

sys.path.insert(0, str(Path(__file__).parent))

from serving_support import POCKET, TOKENS, Pair, Run, load_msd

from eagle.questions import Question, read_questions
from eagle.serving.draft import export_draft
from llava.export import export_pretrained

RUN_ENGINE = Path(__file__).with_name("run_engine.py")
QUIET = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = Path(os.environ.get("MSD_VLLM_PYTHON") or REPO / ".venv-vllm" / "bin" / "python").absolute()
    reason = python.parents[1] / ".reason"
    if reason.is_file():
        pytest.skip(reason.read_text().strip())
    if not python.is_file():
        pytest.skip(f"no environment with vLLM at {python}; `make test-serving` makes one")
    return str(python)


@pytest.fixture(scope="session")
def vllm_environment() -> dict[str, str]:
    """Environment variables of vLLM's processes: its own packages only."""
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **QUIET}


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    return read_questions(POCKET / "data" / "heldout.jsonl")


@pytest.fixture(scope="session", params=["llava", "qwen2vl"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    base, draft, folder = POCKET / request.param, POCKET / f"{request.param}-msd", tmp_path_factory.mktemp("exported")
    model = export_pretrained(base, folder / "base") if request.param == "llava" else base
    return Pair(base, draft, model, export_draft(draft, folder / "draft", base), load_msd(base, draft))


@pytest.fixture
def run_engine(vllm_python: str, vllm_environment: dict[str, str], tmp_path: Path) -> Run:
    """Runs requests in an engine of its own process; see `run_engine.py`. Answers that fail raise its messages."""

    def run(pair: Pair, requests: list[dict[str, Any]], together: bool = False, **engine: Any) -> dict[str, Any]:
        draft, method = engine.pop("draft", pair.draft), engine.pop("method", "eagle")
        own_places = engine.pop("own_places", False)
        sampling = engine.pop("sampling", [{"temperature": 0.0, "max_tokens": TOKENS}])
        settings = {
            "model": str(pair.model), "dtype": "float32", "enforce_eager": True, "max_model_len": 1024,
            "kv_cache_memory_bytes": 400 * 2**20, "disable_log_stats": False, **engine,
        }  # fmt: skip
        if draft is not None:
            settings["speculative_config"] = {"method": method, "model": str(draft), "num_speculative_tokens": 5}
        job = {"engine": settings, "sampling": sampling, "together": together, "requests": requests}
        job["own_places"] = own_places
        job_file, out_file = tmp_path / "job.json", tmp_path / "out.json"
        job_file.write_text(json.dumps(job))
        command = [vllm_python, str(RUN_ENGINE), str(job_file), str(out_file)]
        done = subprocess.run(
            command, env=vllm_environment, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(out_file.read_text())

    return run
