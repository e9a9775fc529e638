"""JSON files that users bring, or that a run left: read whole, or one message that says what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.files import lfs_pointer


def read_json(path: Path, given: str = "", remedy: str = "") -> dict[str, Any]:
    """The object in a JSON file. given: what named the file (an option, with a space behind it); remedy: what to do, in the message.

    Raises UserError for a file that cannot be read, is cut off, or holds something else.
    """
    text = read_text(path, given, remedy)
    where, then = f"{given}{path}", f" {remedy[0].upper()}{remedy[1:]}" if remedy else ""
    remedy = f": {remedy}" if remedy else ""
    if not text.strip():
        raise UserError(f"{where} is empty (a full disk, an interrupted copy?){remedy}")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno}: no whole JSON ({error.msg}): was it cut off?{then}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be read{remedy}") from None
    except ValueError as error:
        raise UserError(f"{where}: {without_advice(error)}{remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(content).__name__}{remedy}")
    return content


def read_text(path: Path, given: str = "", remedy: str = "") -> str:
    """A file's text. Raises UserError where it cannot be read, or is no UTF-8. given, remedy: as in `read_json`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{given}{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{given}{path} is not UTF-8 text (byte {error.start}): {remedy or 'save it as UTF-8'}") from None
    pointer = lfs_pointer(path)
    if pointer is not None:
        raise UserError(f"{given}{path} {pointer}")
    return text


def without_advice(error: Exception) -> str:
    """Python's own words, without its advice."""
    return str(error).partition(";")[0]


SEAL = "sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file with its own hash in it, under SEAL."""
    return dict(content) | {SEAL: _hash(content)}


def unsealed(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content without its hash; what others wrote has none. Raises UserError where the hash is of another content."""
    bare = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content and content[SEAL] != _hash(bare):
        raise UserError(f"{where} is not what was written there ({SEAL}): copy or write it again; if you changed it, take out `{SEAL}`")
    return bare


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
