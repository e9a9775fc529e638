"""From `model.source` to a folder: a local one, or the Hub's snapshot at one commit."""

from __future__ import annotations

from pathlib import Path

from moejax.errors import UserError

_DOWNLOAD = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")


def resolve(source: str, revision: str | None = None, field: str = "model.source") -> Path:
    """The folder of a model or adapter: `source` itself, or the Hub's snapshot of that id (downloaded where it is not cached).

    field: where the config names it, for messages. Raises UserError where neither is there.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise UserError(
            f"{field} = {source!r}: no such folder (expected a folder in Hub layout, or a Hub id like org/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(_DOWNLOAD)))
        if not any(folder.glob("*.safetensors")):  # BlackMamba's checkpoints are PyTorch's
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*_DOWNLOAD, "pytorch_model.bin"]))
        return folder
    except Exception as error:
        raise UserError(
            f"{field} = {source!r} is no local folder, and the Hub could not be asked ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}). Check the id and the network, or give a folder"
        ) from error
