"""Drafts with their model card: into a folder, or into a repository of the hub.

save_pretrained(draft, "out", About.of(Path("checkpoints/final")))
push_to_hub("checkpoints/final", "me/my-draft", private=True, bench="bench.json")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.msd import DraftModel
from eagle.model_card import About, card_of
from llava.errors import UserError
from llava.files import atomic_write
from llava.hub import is_repository_name


def save_pretrained(draft: DraftModel, folder: str | Path, about: About | None = None, name: str | None = None) -> Path:
    """Writes config, weights in their own dtype, and the model card. `load_draft` and `MSDModel.from_pretrained` read
    the folder.

    Args:
        about: what the card tells.
        name: under which the card says the draft is loaded; by default the folder's name.
    """
    folder = save_draft(draft, folder, dtype=draft.dtype)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(card_of(name or folder.name, about or About()), encoding="utf-8")
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
    """Writes what `push_to_hub` uploads; arguments and errors as there."""
    if not is_repository_name(repo):
        raise UserError("no name of a hub repository", where=repo, fix="give owner/name")
    if isinstance(draft, DraftModel):
        return save_pretrained(draft, folder, About.of(None, base_model, license, bench), repo)
    about = About.of(Path(draft), base_model, license, bench)
    if bench is not None:
        _check_report(about.bench, bench, (str(Path(draft).resolve()), repo))
    return save_pretrained(load_draft(draft), folder, about, repo)


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
    """Uploads a draft and its card in one commit; makes the repository if need be.

    Args:
        draft: a model, or the folder of a checkpoint, whose training is then told in the card.
        repo: owner/name.
        private: of a new repository; an existing public one is refused.
        base_model: its hub name; by default the one that the training recorded.
        license: of the weights; by default the card says that the base model's applies.
        bench: a report of `msd bench` on this draft.
        token: by default the one that `hf auth login` or HF_TOKEN gave.

    Returns:
        The address of the commit.

    Raises:
        UserError: the draft is broken, the report is of another draft, or the hub refuses.
    """
    with TemporaryDirectory() as folder:
        write_release(draft, folder, repo, base_model=base_model, license=license, bench=bench)
        return _upload(Path(folder), repo, private, token, message)


def _check_report(report: Mapping[str, Any], path: str | Path, names: Sequence[str]) -> None:
    """Raises `UserError` where a report measured a draft of another name than all of ``names``; folders may differ."""
    measured = str(report["settings"].get("msd_model"))
    if PurePath(measured).name not in {PurePath(name).name for name in names}:
        raise UserError(f"the report measured another draft, {measured}", where=path, fix="run msd bench on this one")


def _upload(folder: Path, repo: str, private: bool, token: str | None, message: str) -> str:
    """One commit with everything in the folder."""
    api = HfApi(token=token)
    with _hub_says(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError("the repository exists and is public", where=repo, fix="make it private, or drop --private")
        written = sorted(path for path in Path(folder).iterdir() if path.is_file())
        files = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=str(path)) for path in written]
        return str(api.create_commit(repo, files, commit_message=message).commit_url)


@contextmanager
def _hub_says(repo: str) -> Iterator[None]:
    """The hub's refusal in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the HTTP library differs between releases of huggingface_hub, and so do its errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        refused = isinstance(error, HfHubHTTPError)
        fix = f"{reason}; log in with a token that may write" if refused else reason
        raise UserError("the hub did not take the draft", where=repo, fix=fix) from error
