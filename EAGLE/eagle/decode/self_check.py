"""Whether the engine gives what transformers' `generate` gives, tested on one short prompt when a base is loaded.

`eagle.families.layers` lists what is verified exactly. This finds what no list foresees: a layer that reads the mask of
a tree in another way, or a value of a config with which the model or its processor fails.

The prompt has a small picture. `generate` continues it by `NEW` tokens. The engine reads the same prompt, verifies a
tree of these tokens, each beside a wrong one, keeps the right path, and verifies the token after it. All logits on the
path are compared.

A base that passed is recorded in ``MSD_CACHE`` (or the user's cache folder) ``/self-checks/<key>.json`` and not tested
again. The key is made of the configs of model and processor, dtype, device and the versions of the packages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from eagle.cache import cache_folder
from eagle.decode.decoder import nan_error
from eagle.decode.masks import MaskBuffer
from eagle.decode.tree import ancestor_mask
from eagle.families import Target
from eagle.provenance import now, versions
from llava.checkpoint import quiet_transformers
from llava.errors import UserError, is_out_of_memory, reason_of
from llava.files import write_text
from llava.memory import within_memory

QUESTIONS = ("What is in this picture?", "Please describe it in a few words.")
PACKAGES = ("msd-llava", "msd-eagle", "torch", "transformers")
FIX = "report it with the output of `msd doctor`; --no-self-check or self_check=False loads it without this test"
CONFIGS = "compare its configs with those of its release"
NEW = 6
"""Tokens of `generate`. All but two are right nodes of the tree; the last two are the token after it, and a token of
which only the logits are compared."""
LONGEST_WINDOW = 512
"""A prompt is longer than the window of sliding layers, up to this size: reading it must not take minutes on a CPU."""
EXACT = 1e-4
"""Allowed difference in float32, where forwards of different shapes differ by about 1e-6."""
LOOSE = 0.5
"""Allowed difference in 16 bit and quantised. Rounding gives a few hundredths, and more at a few tokens where experts
change, so the median of the tokens counts. Masks and positions that are wrong give about 1 on a trained model."""
SIDES = (64, 48)
log = logging.getLogger(__name__)


def self_check(target: Target) -> bool:
    """Tests a loaded base model, unless it passed with the same config and versions before.

    Returns:
        False if there was no memory for it, which is logged.

    Raises:
        UserError: it fails on the prompt, or the engine's logits are others than those of `generate`.
    """
    described = describe(target)
    text = json.dumps(described, sort_keys=True, default=str)
    path = cache_folder("self-checks") / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if os.path.isfile(path):  # False where the folder may not be read, unlike `Path.is_file`
        return True
    if within_memory(lambda: [compare(target)]) is None:
        log.warning("%s: no memory for the self-check, so it was left out", target.config.name_or_path)
        return False
    try:
        write_text(path, json.dumps({"passed": now()} | described, indent=1, default=str) + "\n")
    except (UserError, OSError) as error:
        log.warning("the result of the self-check is not kept for next time: %s", error)
    return True


def describe(target: Target) -> dict[str, Any]:
    """Everything that the result depends on, as JSON values, except for weights."""
    parts = {name: getattr(target.processor, name, None) for name in ("image_processor", "video_processor")}
    known, config = versions(), target.config.to_dict()
    config.pop("_name_or_path", None)
    return {
        "family": target.family,
        "config": config,
        "attention": target.config.get_text_config()._attn_implementation,
        "processors": {name: part.to_dict() for name, part in parts.items() if part is not None},
        "dtype": str(target.dtype),
        "device": target.device.type,
        "versions": {name: known[name] for name in PACKAGES if name in known},
    }


@torch.inference_mode()
def compare(target: Target) -> None:
    """The test itself. A difference must show with both of `QUESTIONS`: where the scores of two experts are nearly
    equal, rounding alone can change which one is used.

    Raises:
        UserError: as `self_check`.
    """
    limit = EXACT if is_exact(target) else LOOSE
    found = 0.0
    for question in QUESTIONS:
        with failures(target):
            inputs = prompt_of(target, question)
            tokens, expected = stock_logits(target, inputs)
            errors = differences(engine_logits(target, inputs, tokens), expected)
        found = float(errors.max() if limit == EXACT else errors.median())
        if found <= limit:
            return
    what = f"logits of the engine differ from those of transformers by {found:.2g} of their spread"
    raise UserError(f"{what}, so answers would not be exact", target.config.name_or_path, FIX)


@contextmanager
def failures(target: Target) -> Iterator[None]:
    """Names the base in every error of the prompt, and says what failed.

    Raises:
        UserError: in place of any exception but that memory ran out.
    """
    name, what = target.config.name_or_path, "base model cannot answer a short prompt with a picture"
    try:
        with quiet_transformers():
            yield
    except UserError as error:
        raise UserError(f"{what}: {error.what}", name, error.fix) from error
    except Exception as error:  # what the configs say decides what is raised
        if is_out_of_memory(error):
            raise
        raise UserError(f"{what} ({reason_of(error)})", name, CONFIGS) from error


def is_exact(target: Target) -> bool:
    """Whether two forwards that should be equal differ by rounding in float32 only."""
    quantized = getattr(target.config, "quantization_config", None) is not None
    full = target.device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"
    return target.dtype is torch.float32 and full and not quantized


def prompt_of(target: Target, question: str) -> dict[str, Any]:
    """A prompt with a picture, longer than the windows of the model's layers."""
    picture = Image.linear_gradient("L").resize(SIDES).convert("RGB")
    settings = target.config.get_text_config().to_dict()
    sizes = [size for name, size in settings.items() if ("window" in name or "chunk" in name) and type(size) is int]
    wanted = max((size for size in sizes if size <= LONGEST_WINDOW), default=0)
    text = question
    while True:
        inputs = target.prepare(f"{target.image_mark}\n{text}", [picture])
        if inputs["input_ids"].shape[1] > wanted:
            return inputs
        text = f"{text} {text}"


def stock_logits(target: Target, inputs: dict[str, Any]) -> tuple[list[int], Tensor]:
    """`NEW` tokens of transformers' greedy `generate`, and the logits [NEW, V] from which they were chosen.

    The checkpoint's generation config is set aside: no end token, no penalties.
    """
    model, ids = target.model, inputs["input_ids"]
    media = {getattr(target.config, each.token) for each in target.media}
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=[index for index in sorted(media) if index < target.vocab_size] or None,  # they need pictures
    )  # fmt: skip
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(**inputs | target.complete_inputs(ids, inputs), generation_config=settings)
    finally:
        model.generation_config = own
    return output.sequences[0, ids.shape[1] :].tolist(), torch.cat(output.logits)


def engine_logits(target: Target, inputs: dict[str, Any], tokens: list[int]) -> Tensor:
    """[NEW, V] the engine's logits for the same tokens."""
    *right, after, _ = tokens
    if target.verifies_trees:  # a wrong token before each right one, which a mask must hide
        rows = target.model.get_input_embeddings().weight.shape[0]
        nodes = [right[0], *(each for token in right[1:] for each in ((token + 1) % rows, token))]
        parents = [-1, *(node for parent in range(0, len(nodes) - 2, 2) for node in (parent, parent))]
        path = list(range(0, len(nodes), 2))
    else:
        nodes, parents, path = right, list(range(-1, len(right) - 1)), list(range(len(right)))
    past, size, device = inputs["input_ids"].shape[1], len(nodes), target.device
    cache = target.new_cache(1, past + size + 1)
    (prefill,) = list(target.prefill_each(inputs, cache))
    block = ancestor_mask(torch.tensor(parents, device=device)).unsqueeze(0)  # [1, N, N]
    depths = block.sum(dim=-1) - 1  # [1, N]
    mask = MaskBuffer(size, past + size, target.dtype, device).window([past], block)
    masks = target.masks_by_layer(mask, [past], depths)
    first = prefill.next_position.to(device).unsqueeze(1)  # [1, 1]
    tree = target.verify(torch.tensor([nodes], device=device), first + depths, masks, cache)  # [1, N, H]
    cache.keep([past], [path])
    last = target.verify(torch.tensor([[after]], device=device), first + len(right), None, cache)  # [1, 1, H]
    return target.head(torch.cat([prefill.hidden[:, -1], tree[0, path], last[0]]))


def differences(found: Tensor, expected: Tensor) -> Tensor:
    """[n] root mean square difference of logits [n, V], relative to the spread of the expected ones.

    Raises:
        UserError: the expected ones are not numbers.
    """
    found, expected = found.float().cpu(), expected.float().cpu()
    if bool(expected.isnan().any()):
        raise nan_error()
    spread = expected.std(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (found - expected).square().mean(dim=-1).sqrt() / spread
