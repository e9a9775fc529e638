"""What a run was made of, by content: a resumed run goes on with the same, whatever has become of a path. No jax here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from moejax.config_values import Names, Section
from moejax.errors import UserError

Part = Literal["data", "evaluation", "questions", "tokenizer", "adapter", "base", "steps"]
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"
)  # fmt: skip
_OF_BASE = {"base_config": "config.json and generation_config.json", "base_files": "names, sizes and index of its files"}


class MadeOf(Section):
    """SHA-256 of contents, in hexadecimal; null: there is none, or it is not known. Written by the run, in its config.yaml.

    data, evaluation: the records as they were read, in order; questions: those of `eval.data`; tokenizer, adapter: their files;
    base_config: config.json and generation_config.json; base_files: names and sizes of the weights' files and their index; base: the
    weights as they are stored in memory, on `platform`. steps: of the whole run. changed: what a resumed run went on with instead, where
    it was asked to.
    """

    data: str | None = None
    evaluation: str | None = None
    questions: str | None = None
    tokenizer: str | None = None
    adapter: str | None = None
    base_config: str | None = None
    base_files: str | None = None
    base: str | None = None
    platform: str | None = None
    steps: int | None = None
    changed: Names = ()

    def differences(self, now: MadeOf) -> dict[str, str]:
        """Part -> both contents, of those that are known on both sides and differ."""
        found: dict[str, str] = {}
        for part in ("data", "evaluation", "questions", "tokenizer", "adapter", "base_config", "base_files", "base"):
            then, here = getattr(self, part), getattr(now, part)
            if part == "base" and self.platform != now.platform:
                continue  # another device may round a scale otherwise; the files were compared
            if then is not None and here is not None and then != here:
                what = _OF_BASE.get(part, "sha256")
                found.setdefault("base" if part in _OF_BASE else part, f"{what} {then[:16]}… when the run began, {here[:16]}… now")
        if self.steps is not None and now.steps is not None and self.steps != now.steps:
            found["steps"] = f"{self.steps} in the whole run when it began, {now.steps} now"
        return found

    def check(self, now: MadeOf, allowed: Iterable[str], folder: Path) -> list[str]:
        """What differs and is allowed to, a line each. Raises UserError, naming each part with both contents, for the rest."""
        allowed = set(allowed)
        if allowed & {"data", "tokenizer"}:
            allowed.add("steps")  # they follow
        found = self.differences(now)
        refused = {part: text for part, text in found.items() if part not in allowed}
        if refused:
            told = "; ".join(f"{part}: {text}" for part, text in refused.items())
            asked = [part for part in refused if part != "steps" or not refused.keys() & {"data", "tokenizer"}]
            raise UserError(
                f"cannot resume {folder} with another content. Changed: {told}. Put back what the run was made of, or start a new run "
                f"under another name=…; to go on with the other content, checkpoint.resume_with_changed=[{','.join(asked)}]"
            )
        return [f"{part}: {text} (checkpoint.resume_with_changed)" for part, text in found.items()]


def records_content(records: Iterable[Any]) -> str:
    """Of records as they were read."""
    hashed = hashlib.sha256()
    for record in records:
        hashed.update(json.dumps(record, ensure_ascii=False, sort_keys=True, default=repr).encode("utf-8", "surrogatepass") + b"\n")
    return hashed.hexdigest()


def tokenizer_content(source: str, tokenizer: Any) -> str:
    """Of a tokenizer's file or files; of one that came by a Hub id, of what it is."""
    path = Path(source)
    if path.is_file():
        return files_content([path])
    if path.is_dir():
        return files_content([path / name for name in _TOKENIZER_FILES if (path / name).is_file()])
    whole = [tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, tokenizer.pad_token, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(whole).encode("utf-8", "surrogatepass")).hexdigest()


def base_content(folder: Path) -> str:
    """Of what a model's folder says of its model, next to the weights: by its values, not by how they are written."""
    files = [path for path in (folder / "config.json", folder / "generation_config.json") if path.is_file()]
    return records_content(_values(path.read_text(encoding="utf-8-sig", errors="replace")) for path in files)


def _values(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # anyone who uses it says so
        return text


def files_content(files: Iterable[Path]) -> str:
    """Of files, in this order, whatever their names."""
    hashed = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()


def sizes_content(sizes: Mapping[str, int], indices: Iterable[Path]) -> str:
    """Of names and sizes of files, and of their indices: at once, also of 90 GB."""
    return hashlib.sha256(json.dumps([sorted(map(list, sizes.items())), files_content(indices)]).encode()).hexdigest()
