"""Writes a draft with its model card into a folder, or uploads both to the Hugging Face hub.

    save_pretrained(draft, "out", About.of("checkpoints/final"))
    push_to_hub("checkpoints/final", "me/my-draft", private=True, bench="bench.json")

The card is made from files: ``provenance.json`` beside the checkpoint, ``training.json`` of its run, and a report of
`msd bench` or results of lmms-eval with a baseline. It says so if one of them is missing. It contains no local paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.head import TrainedHead
from eagle.report.bench import lacks_compiled_baseline, mean_text
from eagle.report.runs import DAMAGE, kind_of
from llava.errors import UserError
from llava.files import read_json
from llava.hub import is_repository_name

TAGS = ["multimodal", "speculative-decoding", "msd"]
BENCH_KEYS = ("speedup", "tau", "tokens_per_second", "baseline_name", "questions", "hardware", "versions", "settings")
CARD = """# {name}

Draft head for multimodal speculative decoding ({kind}) of {base}. It proposes the next tokens; the base model
verifies all of them in one forward pass, so that the output is that of the base model.

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
    ``bench``: the content of these files; results of lmms-eval in the form of a report of `msd bench`.
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
            UserError: a file is damaged, or ``bench`` is neither a report of `msd bench` nor results of lmms-eval with
                the speed-up over the strongest plain decoding.
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
            if kind_of(report) == "lmms-eval":
                try:
                    report = from_lmms(report.get("msd", report), bench)
                except DAMAGE as error:
                    what = f"results of lmms-eval that are not complete ({type(error).__name__}: {error})"
                    raise UserError(what, bench, "evaluate again") from None
            missing = [key for key in BENCH_KEYS if not isinstance(report, dict) or key not in report]
            if missing:
                message = f"it lacks {', '.join(missing)}; use bench --out"
                raise UserError("not a report of msd bench", where=bench, fix=message)
            if lacks_compiled_baseline(report):
                what = "MSD was compiled in this report, and no plain baseline was"
                raise UserError(what, bench, "measure again, with compiled plain decoding")
        named = [str(source["model"]) for source in provenance.get("data", {}).values() if source.get("model")]
        return cls(_public_name(base_model or next(iter(named), "")), license or "", provenance, training, report)


def from_lmms(decoding: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """The decoding statistics of an lmms-eval run with the keys of a report of `msd bench`.

    Raises:
        UserError: it has no speed-up over the strongest plain decoding.
    """
    total, chosen = decoding["total"], decoding.get("baseline", {})
    if total.get("speedup") is None or "name" not in chosen:
        what = "results without a speed-up over the strongest plain decoding"
        raise UserError(what, where, "evaluate with --use_msd --msd_baseline measure")
    ways = [name for speeds in chosen.get("chosen_from", ()) for name in speeds]
    turn = "in two runs" if "results" in chosen else "in turn"
    return {
        **{key: total[key] for key in ("speedup", "paired_speedup", "after_first_token", "tau")},
        "tokens_per_second": {"msd": total["tokens_per_second"], "baseline": total["baseline_tokens_per_second"]},
        "baseline_name": chosen["name"],
        "questions": total["answers"],
        "hardware": {"device": decoding["hardware"]},
        "versions": decoding["versions"],
        "settings": {
            "msd_model": decoding["draft"], "data": ", ".join(decoding["tasks"]), "tree": decoding["tree"],
            "batch_size": decoding["batch_size"],
        },
        "setting": {"compiled": bool(decoding.get("compile"))},
        "baselines": ways,
        "how": f"By lmms-eval, MSD and plain decoding {turn}.",
    }  # fmt: skip


def model_card(repo: str, about: About, kind: str = "MSD") -> ModelCard:
    """The card of the draft that users load as ``repo``. ``kind``: of the head."""
    data = ModelCardData(
        base_model=about.base_model if is_repository_name(about.base_model) else None,
        license=about.license or "other",
        license_name=None if about.license else "as-the-base-model",
        pipeline_tag="image-text-to-text",
        tags=TAGS if kind == "MSD" else [*TAGS, kind.lower()],
    )
    text = CARD.format(
        name=PurePath(repo).name,
        repo=repo,
        kind=kind,
        base=about.base_model or "a base model that is not recorded",
        base_model=about.base_model or "BASE",
        measured=_measured(about.bench),
        training=_training(about),
        license=about.license
        or "The draft contains weights of the base model, or was trained from some, so the base model's licence "
        "applies. The code that trained it is Apache-2.0.",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def save_pretrained(
    draft: TrainedHead, folder: str | Path, about: About | None = None, name: str | None = None
) -> Path:
    """Writes config, weights in their own dtype, and the model card. `load_draft` and `MSDModel.from_pretrained` read
    the folder.

    Args:
        about: content of the card.
        name: the name under which users load the draft; by default the folder's name.
    """
    folder = save_draft(draft, folder, dtype=draft.dtype)
    model_card(name or folder.name, about or About(), draft.kind).save(folder / "README.md")
    return folder


def write_release(
    draft: TrainedHead | str | Path,
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
    if isinstance(draft, TrainedHead):
        return save_pretrained(draft, folder, About.of(None, base_model, license, bench), repo)
    about = About.of(draft, base_model, license, bench)
    if bench is not None:
        measured = str(about.bench["settings"].get("msd_model"))
        if PurePath(measured).name not in (Path(draft).resolve().name, PurePath(repo).name):
            raise UserError(f"the report measured another draft, {measured}", bench, "run msd bench on this one")
    loaded = load_draft(draft)
    if not isinstance(loaded, TrainedHead):
        raise UserError(f"msd push takes heads that are trained here, not {loaded.kind} heads", where=draft)
    return save_pretrained(loaded, folder, about, repo)


def push_to_hub(
    draft: TrainedHead | str | Path,
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
    later, asked = bench.get("after_first_token") or {}, ("temperature", "max_new_tokens", "batch_size")
    each = "batches" if (settings.get("batch_size") or 1) > 1 else "questions"
    rows = {
        "speed-up over the strongest plain decoding": _both(bench, each),
        "speed-up after the first token": _both(later, each) if later.get("speedup") else "",
        "τ (new tokens a cycle, with the bonus token)": f"{bench['tau']:.2f}",
        "tokens/s with MSD": f"{speed['msd']:.1f}",
        f"tokens/s of {bench['baseline_name']}, the strongest baseline": f"{speed['baseline']:.1f}",
        "questions": f"{bench['questions']} of {PurePath(str(settings.get('data', ''))).name}",
        "settings": _pairs({name.replace("_", " "): settings.get(name) for name in asked}),
        "compiled": {True: "yes", False: "no"}.get(bench.get("setting", {}).get("compiled"), ""),
        "tree": _pairs(settings.get("tree") or {}),
        "hardware": hardware.get("gpu")
        or hardware.get("device")
        or f"{hardware.get('cpu')}, {hardware.get('threads')} threads",
        "versions": _pairs(bench["versions"]),
    }
    how = bench.get("how", "By `msd bench`, all in one interleaved run.")
    return f"{how}\n\n" + _table({name: value for name, value in rows.items() if value})


def _both(figures: Mapping[str, Any], each: str) -> str:
    """A speed-up in both conventions, as far as the report has them. ``each``: of what the mean is."""
    mean = mean_text(figures.get("paired_speedup"))
    return f"{figures['speedup']:.2f}x of totals" + (f", {mean} mean of {each}" if mean else "")


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
