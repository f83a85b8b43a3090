"""The ChatML prompt of Qwen2-VL, its tokens, patches and loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from pocket.recipe.draw import draw
from pocket.recipe.encode import IGNORE
from pocket.recipe.sample import Conversation
from pocket.recipe.training import Batch

from .model import MERGE, PATCH
from .tokenizer import SYSTEM, load_tokenizer

PROCESSOR: dict[str, Any] = {
    "patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "min_pixels": 4096, "max_pixels": 262144,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """One conversation: token ids, labels, and the picture's patches (patches, values) and grid, if it has one."""

    ids: list[int]
    labels: list[int]
    patches: torch.Tensor | None
    grid: torch.Tensor | None


class Qwen:
    """Qwen2-VL as the training sees it (training.Family)."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds the tokenizer."""
        self.tokenizer = load_tokenizer(folder)
        self.images = Qwen2VLImageProcessor(**PROCESSOR)
        self.end, self.image = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|image_pad|>"])

    def tokens(self, text: str) -> list[int]:
        """Of a piece of text."""
        return list(self.tokenizer(text)["input_ids"])

    def pixels(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches [P, C*T*p*p] and grid [3] (time, rows, columns) of a picture."""
        given = self.images(images=[image], return_tensors="pt")
        return given["pixel_values"], given["image_grid_thw"][0]

    def write(self, turns: Sequence[tuple[str, str | None]], image: Image.Image | None) -> Encoded:
        """Only answers and the <|im_end|> behind them carry loss; the last answer may be None."""
        ids = self.tokens(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
        labels = [IGNORE] * len(ids)
        patches, grid = (None, None) if image is None else self.pixels(image)
        for number, (question, answer) in enumerate(turns):
            part = self.tokens("<|im_start|>user\n")
            if grid is not None and number == 0:
                shown = [self.image] * (int(grid.prod()) // MERGE**2)
                part += [*self.tokens("<|vision_start|>"), *shown, *self.tokens("<|vision_end|>")]
            part += self.tokens(f"{question}<|im_end|>\n<|im_start|>assistant\n")
            ids += part
            labels += [IGNORE] * len(part)
            if answer is not None:
                part = [*self.tokens(answer), self.end]
                newline = self.tokens("\n")
                ids += part + newline
                labels += part + [IGNORE] * len(newline)
        return Encoded(ids, labels, patches, grid)

    def encode(self, talk: Conversation) -> Encoded:
        """Tokens and patches of a conversation."""
        image = None if talk.picture is None else draw(talk.picture)
        return self.write([(t.question, t.answer) for t in talk.turns], image)

    def collate(self, samples: list[Encoded], multiple: int = 32) -> Batch:
        """ids and labels [B, T], padded on the right; the patches and grids of all pictures one after another."""
        length = -(-max(len(e.ids) for e in samples) // multiple) * multiple
        ids, labels = torch.full((len(samples), length), self.end), torch.full((len(samples), length), IGNORE)
        for row, e in enumerate(samples):
            ids[row, : len(e.ids)], labels[row, : len(e.ids)] = torch.tensor(e.ids), torch.tensor(e.labels)
        batch = {"ids": ids, "labels": labels}
        shown = [(e.patches, e.grid) for e in samples if e.patches is not None and e.grid is not None]
        if shown:
            batch |= {"patches": torch.cat([p for p, _ in shown]), "grid": torch.stack([g for _, g in shown])}
        return batch

    def hidden(self, model: Any, batch: Batch) -> torch.Tensor:
        """[B, T, H]."""
        types = (batch["ids"] == self.image).int()
        positions = None
        if "grid" in batch:
            positions, _ = model.model.get_rope_index(
                batch["ids"], image_grid_thw=batch["grid"], mm_token_type_ids=types
            )
        output = model.model(
            input_ids=batch["ids"], pixel_values=batch.get("patches"), image_grid_thw=batch.get("grid"),
            position_ids=positions, mm_token_type_ids=types, use_cache=False,
        )  # fmt: skip
        states: torch.Tensor = output.last_hidden_state
        return states
