"""vLLM for `msd serve`: whether it is there, in which version, and whether it can run a pair."""

from __future__ import annotations

from dataclasses import replace

from eagle.doctor import Check, State, problems
from eagle.doctor.served_eagle3 import check_served_eagle3
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.head import DraftHead
from eagle.families import Target
from eagle.serving.draft import check_rows, portable
from eagle.serving.engine import INSTALL_PLUGIN, Vllm, find_vllm
from llava.errors import UserError

VLLM, SERVED = "vLLM", "draft in vLLM"


def look_for_vllm(python: str) -> tuple[Check, str | None]:
    """vLLM and the plugin in the environment of an interpreter, and its model runner if that is known. Nothing else
    needs them, so it is not a problem if they are missing."""
    failed: list[Check] = []
    with problems(failed, VLLM):
        vllm = find_vllm(python, ask_runner=True)
    return (failed[0], None) if failed else (_found(vllm), vllm.runner)


def _found(vllm: Vllm) -> Check:
    if vllm.version is None:
        return Check(VLLM, State.OK, "not installed; only msd serve needs it")
    found = f"{vllm.version}, {vllm.runner or 'unknown'} model runner"
    if vllm.plugin is None:
        return Check(VLLM, State.WARNING, f"{found}; msd-vllm is not installed beside it", INSTALL_PLUGIN)
    found = f"{found}; msd-vllm {vllm.plugin}"
    if vllm.note:
        return Check(VLLM, State.WARNING, f"{found}: {vllm.note}", "install the tested version for msd serve")
    return Check(VLLM, State.OK, found)


def check_served_by_vllm(draft: DraftHead, name: str, target: Target | None, runner: str | None) -> list[Check]:
    """Whether vLLM runs a draft as it was trained; what it cannot run is a problem.

    Args:
        target: the base model, on the meta device; None if it is not known.
        runner: of vLLM, "V1" or "V2"; None if it is not known.
    """
    if isinstance(draft, Eagle3Draft):
        return check_served_eagle3(draft, target, runner)
    check = check_served_draft(draft, name)
    return [check if check.state is State.OK else replace(check, state=State.PROBLEM)]


def check_served_draft(draft: DraftHead, name: str) -> Check:
    """Whether vLLM can run a draft of its kind and settings."""
    try:
        if isinstance(draft, Eagle3Draft):
            check_rows(draft.config.image_tokens, "vLLM", name)
            return Check(SERVED, State.OK, "vLLM has its own EAGLE-3", "--served-by vllm compares the conventions")
        portable(draft, name)
    except UserError as error:
        return Check(SERVED, State.WARNING, error.what, error.fix or "")
    return Check(SERVED, State.OK, "can be exported (msd export --to vllm)")
