"""The hub and the folder of training pictures."""

from __future__ import annotations

import os
from pathlib import Path

from eagle.doctor.check import Check, State
from eagle.picture_sources import SOURCES, PictureSet

PICTURES = {source.path: source.pictures for source in SOURCES if isinstance(source, PictureSet)}
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp")
GUIDE = "image_data/README.md says how to fetch it"


def check_hub() -> Check:
    """One request to the hub, at the address in HF_ENDPOINT where that is set."""
    from huggingface_hub import constants, get_session, get_token

    address = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return Check("hub", State.PROBLEM, "HF_HUB_OFFLINE is set: nothing is asked", "unset HF_HUB_OFFLINE")
    try:
        status = get_session().get(f"{address}/api/models?limit=1", timeout=10).status_code
    except Exception as error:  # the HTTP library differs between releases of huggingface_hub, and so do its errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        mend = "check the network, a proxy, HF_ENDPOINT; without it, models come from folders or the cache"
        return Check("hub", State.PROBLEM, f"{address} cannot be reached ({reason})", mend)
    account = "a token is set" if get_token() else "no token: public models only, no push"
    if status == 200:
        return Check("hub", State.OK, f"{address} answers; {account}")
    return Check("hub", State.PROBLEM, f"{address} answers with status {status}", "is HF_ENDPOINT a hub?")


def check_pictures(root: Path) -> list[Check]:
    """One row for each folder of the training sets."""
    if not root.is_dir():
        return [Check("data", State.PROBLEM, f"no such folder: {root}", GUIDE)]
    return [_check_set(root, name, expected) for name, expected in PICTURES.items()]


def _check_set(root: Path, name: str, expected: int) -> Check:
    topic, folder = f"data {name}", root / name
    if not folder.is_dir():
        return Check(topic, State.PROBLEM, "no such folder", GUIDE)
    with os.scandir(folder) as entries:
        count = sum(entry.name.lower().endswith(PICTURE_ENDINGS) for entry in entries)
    found = f"{count:,} of {expected:,} pictures".replace(",", " ")
    if count == 0:
        return Check(topic, State.PROBLEM, found, GUIDE)
    if count < expected:
        return Check(topic, State.WARNING, found, f"{GUIDE}; conversations of missing pictures are skipped")
    return Check(topic, State.OK, found)
