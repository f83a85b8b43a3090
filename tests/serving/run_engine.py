"""Runs one vLLM engine in a process of its own, under the Python of vLLM's environment.

    PYTHON run_engine.py JOB.json OUT.json

A job is ``{"engine": arguments of vllm.LLM, "sampling": [arguments of SamplingParams, ...], "together": bool,
"own_places": bool, "requests": [{"prompt_token_ids": ids, "images": [paths]}, ...]}``. Each request is answered with
each sampling. The result has the token ids of the answers, all samples of each, and vLLM's own counters of speculation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def give_own_places() -> None:
    """Behind a picture, the V1 runner of vLLM 0.32 keeps the rows of drafted tokens after the first at the places of
    rows of the prompt: it takes M-RoPE positions for places (vLLM issue 54498). With this each row has its own."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    update = SpecDecodeBaseProposer._update_positions_dependent_metadata

    def with_own_places(self: Any, positions: Any, metadata: Any, batch_size: int, *sizes: int) -> Any:
        following = positions + 1  # [3, B]
        places = (metadata.seq_lens[:batch_size] - 1).to(positions.dtype).expand(3, -1)
        update(self, places, metadata, batch_size, *sizes)
        self.mrope_positions[:, :batch_size] = following
        return self.mrope_positions[:, :batch_size]

    SpecDecodeBaseProposer._update_positions_dependent_metadata = with_own_places


def main(job_file: str, out_file: str) -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    if job.get("own_places"):
        give_own_places()
    engine = LLM(**job["engine"])
    requests: list[dict[str, Any]] = []
    for each in job["requests"]:
        request = {"prompt_token_ids": each["prompt_token_ids"]}
        if each["images"]:
            request["multi_modal_data"] = {"image": [Image.open(path).convert("RGB") for path in each["images"]]}
        requests.append(request)
    groups = [requests] if job["together"] else [[request] for request in requests]
    outputs = [
        out
        for sampling in job["sampling"]
        for group in groups
        for out in engine.generate(group, SamplingParams(**sampling), use_tqdm=False)
    ]
    counters: dict[str, Any] = {}
    for metric in engine.get_metrics():
        if metric.name.startswith("vllm:spec_decode"):
            counters[metric.name.removeprefix("vllm:spec_decode_")] = (
                list(metric.values) if hasattr(metric, "values") else metric.value
            )
        if metric.name == "vllm:prefix_cache_hits":
            counters["prefix_cache_hits"] = metric.value
    proposer = sys.modules.get("vllm.v1.spec_decode.llm_base_proposer")
    result = {
        "ids": [list(out.outputs[0].token_ids) for out in outputs],
        "samples": [[list(sample.token_ids) for sample in out.outputs] for out in outputs],
        "prompt_lengths": [len(out.prompt_token_ids) for out in outputs],
        "counters": counters,
        "wrapped": bool(proposer and getattr(proposer.SpecDecodeBaseProposer.propose, "is_msd", False)),
    }
    Path(out_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
