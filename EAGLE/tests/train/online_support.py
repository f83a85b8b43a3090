"""A tiny base with pictures and conversations, and the command that trains on them, stored or online."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corpus_support import turns
from tiny_llava import make_image, make_liuhaotian
from tiny_stock import make_qwen

from eagle.families.draft_config import vispec_config_of
from eagle.ge_data import allocation
from llava.errors import run_cli

FAMILIES = {"llava": make_liuhaotian, "qwen2_vl": make_qwen}
MODEL_TYPES = {"llava": "llava_v15", "qwen2_vl": "qwen2_vl"}
SIZES = {"a.png": (60, 60), "b.png": (112, 60), "c.png": (56, 100)}
LENGTH = 300


def annotations() -> list[dict[str, Any]]:
    """Ten usable rows of each kind, of different length, and two that cannot be used."""
    rows: list[dict[str, Any]] = []
    for n in range(10):
        rivers = "The Nile is longer than the Rhine. " * (n % 3 + 1)
        rows.append({"id": f"t{n}", "conversations": turns("Name two rivers.", rivers, "And?", f"Number {n}.")})
        name = sorted(SIZES)[n % 3]
        rows.append({"id": n, "image": name, "conversations": turns("<image>\nWhat colours?", f"Red, green and {n}.")})
    several = {"id": "two", "image": ["a.png", "c.png"], "conversations": turns("<image> or <image>?", "The second.")}
    lost = {"id": "lost", "image": "nowhere.png", "conversations": turns("<image>\nWhat?", "Nothing.")}
    return [*rows, several, lost, {"id": "mute", "conversations": turns("Well?")}]


class Case:
    """A tiny base, its data, and the command on stored states or online."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.base = FAMILIES[family](folder / "base")
        (folder / "pictures").mkdir()
        for seed, (name, (width, height)) in enumerate(SIZES.items()):
            make_image(folder / "pictures" / name, width, height, seed)
        self.rows = folder / "rows.json"
        self.rows.write_text(json.dumps(annotations()))
        self._write_configs()

    def _write_configs(self) -> None:
        config = json.loads((self.base / "config.json").read_text())
        draft = {"model_type": self.family, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
                 "vocab_size": {**config, **config.get("text_config", {})}["vocab_size"]}  # fmt: skip
        if self.family == "qwen2_vl":
            draft |= {"msd": {"positions": "mrope"}, "rope_scaling": {"mrope_section": [1, 1, 2]}}
        train = {"epochs": 4, "learning_rate": 1e-3, "log_every": 1, "noise": 0.1, "validation_share": 0.2,
                 "max_length": LENGTH, "simulated_depth": 2, "rollout_steps": 2, "save_every": 3}  # fmt: skip
        (self.folder / "draft.json").write_text(json.dumps({**draft, "train": train}))
        sizes = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
        (self.folder / "ds.json").write_text(json.dumps(sizes))

    def allocate(self, *flags: str) -> None:
        for kind in "tv":
            command = ["--outdir", str(self.folder / kind), "--model_type", f"{MODEL_TYPES[self.family]}_{kind}"]
            command += [
                "--model",
                str(self.base),
                "--json_data_path",
                str(self.rows),
                "--gpus",
                "cpu",
                "--dtype",
                "float32",
            ]
            command += ["--image_data_path", str(self.folder / "pictures"), "--max-length", str(LENGTH), *flags]
            assert run_cli(lambda argv=command: allocation.main(argv)) == 0

    @property
    def stored(self) -> list[str]:
        return ["--tmpdir_t", str(self.folder / "t"), "--tmpdir_v", str(self.folder / "v")]

    @property
    def online(self) -> list[str]:
        files = ["--annotations_t", str(self.rows), "--annotations_v", str(self.rows), "--dtype", "float32"]
        return ["--online", *files, "--image-folder", str(self.folder / "pictures")]

    def command(self, cpdir: str, *flags: str) -> list[str]:
        return ["main_deepspeed.py", "--basepath", str(self.base), "--cpdir", str(self.folder / cpdir),
                "--config", str(self.folder / "draft.json"), "--deepspeed_config", str(self.folder / "ds.json"),
                "--tracker", "none", *flags]  # fmt: skip

    def history(self, cpdir: str) -> dict[str, Any]:
        return json.loads((self.folder / cpdir / "training.json").read_text())

    def curve(self, cpdir: str) -> list[float]:
        return [row["loss"] for row in self.history(cpdir)["steps"]]


class ViSpecCase(Case):
    """Training of a ViSpec head by the command."""

    def _write_configs(self) -> None:
        super()._write_configs()
        config = json.loads((self.folder / "draft.json").read_text())
        head = {**vispec_config_of(self.base).to_dict(), "vispec": {"queries": 3}}
        train = {"epochs": 4, "learning_rate": 1e-3, "log_every": 1, "simulated_depth": 2, "save_every": 2}
        train |= {key: config["train"][key] for key in ("validation_share", "max_length")}
        (self.folder / "draft.json").write_text(json.dumps({**head, "train": train}))
