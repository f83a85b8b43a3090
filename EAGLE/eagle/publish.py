"""Writes a draft with its model card into a folder, or uploads both to the Hugging Face hub.

    save_pretrained(draft, "out", About.of("checkpoints/final"))
    push_to_hub("checkpoints/final", "me/my-draft", private=True, bench="bench.json")

The card is made from files: ``provenance.json`` beside the checkpoint, ``training.json`` of its run, and a report of
`msd bench`. It says so if one of them is missing. It contains no local paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from eagle.drafts.checkpoint import load_msd_draft, require_msd, save_draft
from eagle.drafts.msd import DraftModel
from llava.errors import UserError
from llava.files import read_json
from llava.hub import is_repository_name

TAGS = ["multimodal", "speculative-decoding", "msd"]
BENCH_KEYS = ("speedup", "tau", "tokens_per_second", "baseline_name", "questions", "hardware", "versions", "settings")
CARD = """# {name}

Draft head for multimodal speculative decoding (MSD) of {base}. It proposes the next tokens; the base model verifies all
of them in one forward pass, so that the output is that of the base model.

## Use

```python
from eagle import MSDModel

msd = MSDModel.from_pretrained("{base_model}", "{repo}", device_map="auto")
```

```bash
msd verify --base-model {base_model} --msd-model {repo} --data questions.jsonl
```

## Measured

{measured}

## Training

{training}

## Licence

{license}

## Citation

```bibtex
@article{{lin2025msd,
  title   = {{Speculative Decoding Reimagined for Multimodal Large Language Models}},
  author  = {{Lin, Luxi and Lin, Zhihang and Zeng, Zhanpeng and Ji, Rongrong}},
  journal = {{arXiv preprint arXiv:2505.14260}},
  year    = {{2025}}
}}
```
"""


@dataclass(frozen=True)
class About:
    """What is known of a draft; empty where nothing is.

    ``base_model``: hub name, or name of the folder. ``license``: of the weights. ``provenance``, ``training``,
    ``bench``: the content of these files.
    """

    base_model: str = ""
    license: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    bench: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: str | Path | None = None,
        base_model: str | None = None,
        license: str | None = None,
        bench: str | Path | None = None,
    ) -> About:
        """Reads the records beside the checkpoint in ``folder``, and the report ``bench``.

        Args:
            base_model: by default the one that the training data names.

        Raises:
            UserError: a file is damaged, or ``bench`` is not a report of `msd bench`.
        """
        provenance: dict[str, Any] = {}
        training: dict[str, Any] = {}
        report: dict[str, Any] = {}
        if folder is not None and (made := Path(folder) / "provenance.json").is_file():
            provenance = read_json(made, "provenance")
            run = Path(folder).resolve().parent / "training.json"
            training = read_json(run, "training record") if run.is_file() else {}
        if bench is not None:
            report = read_json(bench, "bench report")
            missing = [key for key in BENCH_KEYS if not isinstance(report, dict) or key not in report]
            if missing:
                message = f"it lacks {', '.join(missing)}; use bench --out"
                raise UserError("not a report of msd bench", where=bench, fix=message)
        named = [str(source["model"]) for source in provenance.get("data", {}).values() if source.get("model")]
        return cls(_public_name(base_model or next(iter(named), "")), license or "", provenance, training, report)


def model_card(repo: str, about: About) -> ModelCard:
    """The card of the draft that users load as ``repo``."""
    data = ModelCardData(
        base_model=about.base_model if is_repository_name(about.base_model) else None,
        license=about.license or "other",
        license_name=None if about.license else "as-the-base-model",
        pipeline_tag="image-text-to-text",
        tags=TAGS,
    )
    text = CARD.format(
        name=PurePath(repo).name,
        repo=repo,
        base=about.base_model or "a base model that is not recorded",
        base_model=about.base_model or "BASE",
        measured=_measured(about.bench),
        training=_training(about),
        license=about.license
        or "The draft contains a copy of the base model's token embedding, so the base model's licence applies. The "
        "code that trained it is Apache-2.0.",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def save_pretrained(draft: DraftModel, folder: str | Path, about: About | None = None, name: str | None = None) -> Path:
    """Writes config, weights in their own dtype, and the model card. `load_draft` and `MSDModel.from_pretrained` read
    the folder.

    Args:
        about: content of the card.
        name: the name under which users load the draft; by default the folder's name.
    """
    folder = save_draft(draft, folder, dtype=draft.dtype)
    model_card(name or folder.name, about or About()).save(folder / "README.md")
    return folder


def write_release(
    draft: DraftModel | str | Path,
    folder: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    bench: str | Path | None = None,
) -> Path:
    """Writes the files that `push_to_hub` uploads; arguments and errors as there."""
    if not is_repository_name(repo):
        raise UserError("not the name of a hub repository", where=repo, fix="give owner/name")
    if isinstance(draft, DraftModel):
        require_msd(draft, "msd push", repo)
        return save_pretrained(draft, folder, About.of(None, base_model, license, bench), repo)
    about = About.of(draft, base_model, license, bench)
    if bench is not None:
        measured = str(about.bench["settings"].get("msd_model"))
        if PurePath(measured).name not in (Path(draft).resolve().name, PurePath(repo).name):
            raise UserError(f"the report measured another draft, {measured}", bench, "run msd bench on this one")
    return save_pretrained(load_msd_draft(draft, "msd push"), folder, about, repo)


def push_to_hub(
    draft: DraftModel | str | Path,
    repo: str,
    *,
    private: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    bench: str | Path | None = None,
    token: str | None = None,
    message: str = "Upload MSD draft",
) -> str:
    """Uploads a draft and its card in one commit; creates the repository if needed.

    Args:
        draft: a model, or the folder of a checkpoint, whose training the card then describes.
        repo: owner/name.
        private: create a private repository; an existing public one is refused.
        base_model: its hub name; by default the one that the training recorded.
        license: of the weights; by default the card says that the base model's applies.
        bench: a report of `msd bench` on this draft.
        token: by default the one of `hf auth login` or HF_TOKEN.

    Returns:
        The address of the commit.

    Raises:
        UserError: the draft is damaged, the report is of another draft, or the hub refuses.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        write_release(draft, folder, repo, base_model=base_model, license=license, bench=bench)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise UserError("the repository exists and is public", repo, "make it private, or drop --private")
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url)
        except UserError:
            raise
        except Exception as error:  # its HTTP library, and so the errors, differ between releases of huggingface_hub
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            login = "; log in with a token that may write" if isinstance(error, HfHubHTTPError) else ""
            raise UserError("the hub did not take the draft", where=repo, fix=reason + login) from error


def _measured(bench: Mapping[str, Any]) -> str:
    if not bench:
        return "Speed and acceptance were not measured."
    settings, hardware, speed = bench["settings"], bench["hardware"], bench["tokens_per_second"]
    rows = {
        "speed-up over plain decoding": f"{bench['speedup']:.2f}x",
        "τ (new tokens a cycle)": f"{bench['tau']:.2f}",
        "tokens/s with MSD": f"{speed['msd']:.1f}",
        f"tokens/s of {bench['baseline_name']}, the strongest baseline": f"{speed['baseline']:.1f}",
        "questions": f"{bench['questions']} of {PurePath(str(settings.get('data', ''))).name}",
        "temperature, new tokens at most": f"{settings.get('temperature')}, {settings.get('max_new_tokens')}",
        "tree": _pairs(settings.get("tree") or {}),
        "hardware": hardware.get("gpu") or f"{hardware.get('cpu')}, {hardware.get('threads')} threads",
        "versions": _pairs(bench["versions"]),
    }
    return "By `msd bench`, all in one interleaved run.\n\n" + _table(rows)


def _training(about: About) -> str:
    made = about.provenance
    if not made:
        return "There is no record of the training beside the checkpoint."
    rows = {
        f"{name} data": f"{source.get('samples')} samples, hidden states of {_public_name(str(source.get('model')))}"
        for name, source in made.get("data", {}).items()
    }
    rows |= {name: str(value) for name, value in made.get("settings", {}).items()}
    if validations := about.training.get("validations"):
        last = validations[-1]
        taus = _pairs({name: f"{result['tau']:.2f}" for name, result in last["results"].items()})
        rows[f"simulated τ in validation, step {last['step']}"] = taus
    rows |= {"code": str(made.get("commit") or "not recorded"), "versions": _pairs(made.get("versions", {}))}
    return _table(rows)


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _public_name(name: str) -> str:
    """A hub name unchanged; of a path the last part only."""
    return name if is_repository_name(name) and not Path(name).exists() else PurePath(name).name
