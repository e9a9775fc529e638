"""From `model.source` to a folder: a local one, or the Hub's snapshot at one commit."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from moejax.errors import UserError
from moejax.files import meant
from moejax.progress import note

_SMALL = ("*.json", "tokenizer*", "*.jinja", "README.md")
_DOWNLOAD = (*_SMALL, "*.safetensors")
_PYTORCH = ("pytorch_model*.bin", "adapter_model.bin")


def resolve(source: str, revision: str | None = None, field: str = "model.source", *, weights: bool = True) -> Path:
    """The folder of a model or adapter: `source` itself, or the Hub's snapshot of that id (downloaded where it is not cached).

    source: a folder, `org/name`, or `org/name@REVISION`. field: where the config names it, for messages. weights: without them only
    configuration, tokenizer and index are downloaded. HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_CACHE and HF_ENDPOINT are huggingface_hub's.
    Raises UserError where neither is there.
    """
    if Path(source).is_dir():
        return Path(source)
    name, _, at = source.partition("@")
    if source.startswith((".", "/")) or name.count("/") != 1:
        raise UserError(
            f"{field} = {source!r}: no such folder{_looked_from(source)} (expected a folder in Hub layout, or a Hub id like org/name)"
        )
    # Else what is fetched in chunks is kept a second time, up to 10 GB of it. Read when the first file is fetched.
    os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
    from huggingface_hub import snapshot_download

    try:
        if not weights:
            return Path(snapshot_download(name, revision=at or revision, allow_patterns=list(_SMALL)))
        folder = Path(snapshot_download(name, revision=at or revision, allow_patterns=list(_DOWNLOAD)))
        if not any(folder.glob("*.safetensors")):  # BlackMamba's checkpoints, and older ones, are PyTorch's
            folder = Path(snapshot_download(name, revision=at or revision, allow_patterns=[*_DOWNLOAD, *_PYTORCH]))
        return folder
    except Exception as error:
        raise UserError(_why(error, f"{field} = {source!r}", at or revision, _looked_from(source))) from error


def weight_sizes(source: str, commit: str) -> dict[str, int]:
    """Name -> bytes of the files with weights that `resolve` would download of a Hub id. Raises UserError where the Hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(HfApi().list_repo_tree(source.partition("@")[0], revision=commit, recursive=True))
    except Exception as error:
        raise UserError(_why(error, f"model.source = {source!r}", commit, _looked_from(source))) from error
    sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    found = _matching(sizes, ["*.safetensors"])
    return {path: sizes[path] for path in found or _matching(sizes, _PYTORCH)}


def small_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer and card of a folder."""
    names = _matching((path.name for path in folder.iterdir() if path.is_file()), _SMALL)
    return [folder / name for name in names if not name.endswith(".index.json")]


def hub_cache() -> Path:
    """Where huggingface_hub keeps what `resolve` downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


_WAITS = (1.0, 10.0, 60.0)
"""Seconds after which a busy Hub is asked again: huggingface_hub itself goes on after a lost connection, not after a server's error."""


def fetch_file(source: str, commit: str, file: str, folder: Path) -> Path:
    """One file of a Hub id, in `folder` and not in the Hub's cache: the caller may delete it. Raises UserError, OSError for a full disk."""
    from huggingface_hub import hf_hub_download

    waits = iter(_WAITS)
    while True:
        try:
            return Path(hf_hub_download(source.partition("@")[0], file, revision=commit, local_dir=folder))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            # What answered the question before a download is the cause of an error of its own.
            status = max(getattr(getattr(e, "response", None), "status_code", 0) for e in (error, error.__cause__))
            wait = next(waits, None) if status >= 500 else None
            if wait is None:
                reason = (str(error).splitlines() or [""])[0][:200]
                raise UserError(
                    f"{file} of {source} at {commit} could not be fetched ({type(error).__name__}: {reason}): check the network and start "
                    "again; what is there already is not fetched again"
                ) from error
            note(f"{file}: the server answered with {status} and is asked again in {wait:.0f} s")
            time.sleep(wait)


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def commit(source: str, folder: Path) -> str | None:
    """The commit of the Hub's snapshot that `resolve(source)` gave; None for a local folder."""
    hub = not Path(source).is_dir() and folder.parent.name == "snapshots"
    return folder.name if hub else None


def is_commit(revision: str | None) -> bool:
    """Whether a revision can never mean another content: a full SHA, and no branch or tag."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _looked_from(source: str) -> str:
    """Where a relative path was looked for: a run's folder may have been moved, and its model not."""
    return "" if source.startswith("/") else f", looked for from {Path.cwd()}{meant(Path(source))}"


def _why(error: Exception, what: str, revision: str | None, looked: str) -> str:
    """One message for what huggingface_hub could not do, and the remedy. looked: where a folder was looked for."""
    from huggingface_hub import constants, errors

    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return (
                f"{what} is no local folder{looked}, and HF_HUB_OFFLINE is set: {constants.HF_HUB_CACHE} has no whole copy of it{at}. "
                "Unset HF_HUB_OFFLINE to download it, set HF_HUB_CACHE to where it is, or give a folder"
            )
        return (
            f"{what} is no local folder{looked}; {constants.HF_HUB_CACHE} has no whole copy of it{at}, and the Hub ({constants.ENDPOINT}) "
            "could not be reached: check the network (behind a proxy HTTPS_PROXY, for a mirror HF_ENDPOINT), or give a folder"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what}: the Hub has no revision {revision!r} of it: expected a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError):  # also what gated and private ones are to those who may not see them
        token = "the token of HF_TOKEN may not read it" if os.environ.get("HF_TOKEN") else "a private or gated one needs HF_TOKEN"
        return f"{what}: no such folder{looked}, and the Hub shows no such repository: check the id; {token}"
    reason = (str(error).splitlines() or [""])[0][:200]
    return (
        f"{what} is no local folder{looked}, and the Hub could not be asked ({type(error).__name__}: {reason}). Check the id and the "
        "network, or give a folder"
    )
