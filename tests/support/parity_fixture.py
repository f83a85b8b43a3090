"""The parity values in the repository (tests/fixtures/parity), written out in the layout of the full set.

Of the vocabulary, only the rows that the cases use are stored (see tests/fixtures/parity/README.md). The others become
zero, and `ReducedHead` gives them together the probability that they have in the full model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from repository import FULL_PARITY
from safetensors.torch import load_file, save_file
from torch import Tensor

CASES = ("text", "image_a", "image_b_mid") if FULL_PARITY.is_dir() else ("text", "image_a")
BASES = {"llava": "llava/tiny-llava-v1.5", "qwen2vl": "qwen2vl/Tiny-Qwen2-VL"}
HEAD, DRAFT_EMBEDDING = "lm_head.weight", "embed_tokens.weight"
EMBEDDING = f"model.{DRAFT_EMBEDDING}"
VOCABULARY = (HEAD, EMBEDDING)
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ReducedHead:
    """A base model's head of which some rows are stored: logits [..., V] whose log-softmax is that of the full head.

    ``hidden`` [N, H] are the hidden states at which the reference drafts, ``rest`` [N] the log-sum-exp over the logits
    of the rows that are not stored; it is computed from the full weights and is here shared evenly among them.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], ids: Tensor, hidden: Tensor, rest: Tensor) -> None:
        self.head, self.ids, self.hidden, self.rest = head, ids, hidden, rest

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        rest = self.rest[torch.cdist(hidden.reshape(-1, hidden.shape[-1]), self.hidden).argmin(-1)]
        reduced = torch.empty_like(logits)
        reduced[:] = (rest - math.log(logits.shape[-1] - len(self.ids))).reshape(*logits.shape[:-1], 1)
        reduced[..., self.ids] = logits[..., self.ids]
        return reduced


def reduced_head(folder: Path, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``head``, or its `ReducedHead` where the model in ``folder`` (llava or qwen2vl) is a reduced one."""
    if not (folder / "weights.safetensors").exists():
        return head
    stored = load_file(folder / "weights.safetensors")
    return ReducedHead(head, stored["ids"].long(), stored["hidden"], stored["rest"])


def expand(source: Path, target: Path) -> Path:
    """Writes the full layout of ``source`` to ``target``: base models as sharded checkpoints, drafts, cases."""
    shutil.copytree(source, target)
    for family, place in BASES.items():
        stored, base = load_file(target / family / "weights.safetensors"), target / place
        vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
        weights = {name[5:]: value for name, value in stored.items() if name.startswith("base.")}
        for name in VOCABULARY:
            full = torch.zeros(vocabulary, weights[name].shape[1], dtype=weights[name].dtype)
            full[stored["ids"].long()] = weights[name]
            weights[name] = full
        (index,) = base.glob("*.index.json")
        shards: dict[str, dict[str, Tensor]] = {}
        for name, shard in json.loads(index.read_text())["weight_map"].items():
            shards.setdefault(shard, {})[name] = weights[name]
        for shard, tensors in shards.items():
            save_file(tensors, base / shard) if shard.endswith(".safetensors") else torch.save(tensors, base / shard)
        if (base / "vocab.json").exists():
            fill_vocabulary(base)
        draft = {name[6:]: value for name, value in stored.items() if name.startswith("draft.")}
        draft[DRAFT_EMBEDDING] = weights[EMBEDDING].bfloat16()
        torch.save(draft, target / family / "draft" / "pytorch_model.bin")
        for case in (target / family / "cases").glob("*.safetensors"):
            values = load_file(case)
            if "pixels" in values:
                values["pixel_values"] = patches_of(values.pop("pixels"))
                save_file(values, case)
    return target


def fill_vocabulary(tokenizer: Path) -> None:
    """Gives ``vocab.json`` an entry for every id below the special tokens', which follow the last one."""
    entries = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    special = json.loads((tokenizer / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    missing = set(range(min(map(int, special)))) - set(entries.values())
    entries |= {f"[unused {number}]": number for number in missing}
    (tokenizer / "vocab.json").write_text(json.dumps(entries), encoding="utf-8")


def patches_of(pixels: Tensor) -> Tensor:
    """[N, 3, P, P] bytes → Qwen2-VL's input [N, 3 * 2 * P * P] float32: normalised, and each patch twice in time."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return ((pixels / 255 - mean) / std).unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1).contiguous()
