"""The model card of a draft: what it belongs to, how it was made, what was measured, how to load and cite it.

Everything comes from files: ``provenance.json`` beside the checkpoint, ``training.json`` of its run, a report of
`msd bench`. What they do not say, the card says is not known. Paths of the machine stay out of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from llava.errors import UserError
from llava.files import read_json
from llava.hub import is_repository_name

TAGS = ("multimodal", "speculative-decoding", "msd")
BENCH_KEYS = ("speedup", "tau", "tokens_per_second", "baseline_name", "questions", "hardware", "versions", "settings")
CITATION = """@article{lin2025msd,
  title   = {Speculative Decoding Reimagined for Multimodal Large Language Models},
  author  = {Lin, Luxi and Lin, Zhihang and Zeng, Zhanpeng and Ji, Rongrong},
  journal = {arXiv preprint arXiv:2505.14260},
  year    = {2025}
}"""


@dataclass(frozen=True)
class About:
    """What a card tells; empty where nothing is known.

    ``base_model``: hub name, or name of the folder. ``license``: of the weights. ``provenance``, ``training``,
    ``bench``: the files of those names, parsed.
    """

    base_model: str = ""
    license: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    bench: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: Path | None = None,
        base_model: str | None = None,
        license: str | None = None,
        bench: str | Path | None = None,
    ) -> About:
        """Reads what is known: the records beside the checkpoint in ``folder``, and the report ``bench``.

        Args:
            base_model: by default the one that the training data names.

        Raises:
            UserError: a file is broken, or ``bench`` is no report of `msd bench`.
        """
        made, run = (folder / "provenance.json", folder.resolve().parent / "training.json") if folder else (None, None)
        provenance = read_json(made, "provenance") if made and made.is_file() else {}
        training = read_json(run, "training record") if provenance and run and run.is_file() else {}
        named = [str(source["model"]) for source in provenance.get("data", {}).values() if source.get("model")]
        base = base_model or next(iter(named), "")
        return cls(_public_name(base), license or "", provenance, training, read_bench(Path(bench)) if bench else {})


def read_bench(path: Path) -> dict[str, Any]:
    """A report that `msd bench --out` wrote."""
    report = read_json(path, "bench report")
    lacking = [key for key in BENCH_KEYS if not isinstance(report, dict) or key not in report]
    if lacking:
        raise UserError("is no report of msd bench", where=path, fix=f"it lacks {', '.join(lacking)}; use bench --out")
    return report


def card_of(name: str, about: About) -> str:
    """The text of README.md for the draft that will be loaded as ``name``."""
    base = about.base_model or "a base model that is not recorded"
    parts = [
        _front_matter(about),
        f"# {PurePath(name).name}",
        f"Draft head for multimodal speculative decoding (MSD) of {base}. It guesses the next tokens; the base model "
        "checks them all in one forward pass and keeps what it would have said anyway.",
        _use(name, about),
        _measured(about.bench),
        _recipe(about),
        _licence(about),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(about: About) -> str:
    """The metadata block that the hub reads. Values are quoted as JSON, which YAML takes."""
    fields: dict[str, Any] = {"license": about.license or "other"}
    if not about.license:
        fields["license_name"] = "as-the-base-model"
    if is_repository_name(about.base_model):
        fields["base_model"] = about.base_model
    fields |= {"pipeline_tag": "image-text-to-text", "tags": list(TAGS)}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"])


def _use(name: str, about: About) -> str:
    base = about.base_model or "BASE"
    return f"""## Use

```python
from eagle import MSDModel

msd = MSDModel.from_pretrained("{base}", "{name}", device_map="auto")
```

```bash
msd verify --base-model {base} --msd-model {name} --data questions.jsonl
```"""


def _measured(bench: Mapping[str, Any]) -> str:
    if not bench:
        return "## Measured\n\nSpeed and acceptance were not measured."
    settings, hardware = bench["settings"], bench["hardware"]
    device = hardware.get("gpu") or f"{hardware.get('cpu')}, {hardware.get('threads')} threads"
    speed = bench["tokens_per_second"]
    rows = {
        "speed-up over plain decoding": f"{bench['speedup']:.2f}x",
        "τ (new tokens a cycle)": f"{bench['tau']:.2f}",
        "tokens/s with MSD": f"{speed['msd']:.1f}",
        f"tokens/s of {bench['baseline_name']}, the strongest baseline": f"{speed['baseline']:.1f}",
        "questions": f"{bench['questions']} of {PurePath(str(settings.get('data', ''))).name}",
        "temperature, new tokens at most": f"{settings.get('temperature')}, {settings.get('max_new_tokens')}",
        "tree": _pairs(settings.get("tree") or {}),
        "hardware": device,
        "versions": _pairs(bench["versions"]),
    }
    return "## Measured\n\nBy `msd bench`, all in one interleaved run.\n\n" + _table(rows)


def _recipe(about: About) -> str:
    if not about.provenance:
        return "## Training\n\nNo record of the training lies beside the checkpoint."
    made = about.provenance
    rows = {
        f"{name} data": f"{source.get('samples')} samples, hidden states of {_public_name(str(source.get('model')))}"
        for name, source in made.get("data", {}).items()
    }
    rows |= {name: str(value) for name, value in made.get("settings", {}).items()}
    validations = about.training.get("validations") or []
    if validations:
        last = validations[-1]
        taus = _pairs({name: f"{result['tau']:.2f}" for name, result in last["results"].items()})
        rows[f"simulated τ in validation, step {last['step']}"] = taus
    rows |= {"code": str(made.get("commit") or "not recorded"), "versions": _pairs(made.get("versions", {}))}
    return "## Training\n\n" + _table(rows)


def _licence(about: About) -> str:
    if about.license:
        return f"## Licence\n\n{about.license}"
    return (
        "## Licence\n\nThe draft holds a copy of the base model's token embedding, so the base model's licence "
        "applies. The code that made it is Apache-2.0."
    )


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _public_name(name: str) -> str:
    """A hub name as it is, of a path the last part only."""
    return name if is_repository_name(name) and not Path(name).exists() else PurePath(name).name
