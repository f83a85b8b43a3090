"""vLLM for `msd serve`: whether it is there, in which version, and whether it can run a pair."""

from __future__ import annotations

from eagle.doctor import Check, State, problems
from eagle.drafts.head import DraftHead
from eagle.serving.draft import portable
from eagle.serving.engine import INSTALL_PLUGIN, find_vllm
from llava.errors import UserError

VLLM, SERVED = "vLLM", "draft in vLLM"


def check_vllm(python: str) -> Check:
    """vLLM and the plugin in the environment of an interpreter. Nothing else needs them, so that they are missing is
    no problem."""
    failed: list[Check] = []
    with problems(failed, VLLM):
        vllm = find_vllm(python, ask_runner=True)
    if failed:
        return failed[0]
    if vllm.version is None:
        return Check(VLLM, State.OK, "not installed; only msd serve needs it")
    found = f"{vllm.version}, {vllm.runner or 'unknown'} model runner"
    if vllm.plugin is None:
        return Check(VLLM, State.WARNING, f"{found}; msd-vllm is not installed beside it", INSTALL_PLUGIN)
    found = f"{found}; msd-vllm {vllm.plugin}"
    if vllm.note:
        return Check(VLLM, State.WARNING, f"{found}: {vllm.note}", "install the tested version for msd serve")
    return Check(VLLM, State.OK, found)


def check_served_draft(draft: DraftHead, name: str) -> Check:
    """Whether vLLM can run a draft of its kind and settings."""
    try:
        portable(draft, name)
    except UserError as error:
        return Check(SERVED, State.WARNING, error.what, error.fix or "")
    return Check(SERVED, State.OK, "can be exported (msd export --to vllm)")
