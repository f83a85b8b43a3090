"""Scoring a continuation with the base model alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from eagle.families import Target
from lmms_eval_msd.conversation import Conversation, Prompt


@torch.inference_mode()
def score(target: Target, conversation: Conversation, prompt: Prompt, continuation: str) -> tuple[float, bool]:
    """Mean negative log-likelihood of ``continuation`` after the prompt, and whether it is the greedy one."""
    space = "" if prompt.text[-1:].isspace() else " "
    inputs = conversation.inputs([replace(prompt, text=prompt.text + space + continuation.strip())])
    ids = inputs["input_ids"][0]  # [F]
    asked = conversation.inputs([prompt])["input_ids"][0]  # [P]
    same = (ids[: len(asked)] == asked[: len(ids)]).long().cumprod(0)
    start = min(int(same.sum()), len(ids) - 1)  # a tokenizer may join the prompt's end with the continuation
    hidden = target.prefill(inputs).hidden[:, start - 1 : -1]
    logits = target.head(hidden)[0].float()  # [n, V]
    wanted = ids[start:].to(logits.device)
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    return float(loss), bool((logits.argmax(dim=-1) == wanted).all())
