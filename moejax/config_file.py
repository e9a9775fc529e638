"""An experiment's file: its sections, with overrides; and what is wrong with them, with the nearest name here or in another tool."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from moejax import installation, other_tools
from moejax.errors import UserError
from moejax.yaml_file import parse_yaml, read_yaml


def read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The sections in a file, with `key.sub=value` overrides. Raises UserError where it holds none."""
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        near = nearest_file(file)
        meant = f": did you mean {near}?" if near else " (expected a YAML file; `moejax init` writes one)"
        raise UserError(f"config file {file} {what}{meant}")
    content = read_yaml(file)
    if not isinstance(content, dict):
        got = "nothing: it is empty" if content is None else "a list" if isinstance(content, list) else repr(str(content)[:60])
        raise UserError(f"{file}: expected a mapping of sections, got {got}")
    for override in overrides:
        apply(content, override)
    return content


def nearest_file(file: Path) -> Path | None:
    """The file that may be meant by a name: next to it, or one that comes with moejax. Without the suffix, which all have."""
    for folder, cutoff in ((file.parent, 0.6), (installation.CONFIGS, 0.8)):
        there = {path.stem: path for path in folder.glob("*.y*ml")}
        if near := difflib.get_close_matches(file.stem, there, n=1, cutoff=cutoff):
            found = there[near[0]]
            return Path("configs") / found.name if Path("configs", found.name).is_file() and folder != file.parent else found
    return None


def apply(content: dict[str, Any], override: str) -> None:
    """Set what `key.sub=value` says; the value is YAML. Raises UserError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, e.g. training.learning_rate=1e-4")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        value = text
    put(content, key, value, f"override {override!r}")


def put(content: dict[str, Any], key: str, value: Any, what: str) -> None:
    """Set `section.sub` of a config's content. what: names the change in a message. Raises UserError where a section is a value."""
    *parents, last = key.split(".")
    node = content
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"{what}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    node[last] = value


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """All of pydantic's findings about a `root` in our words, one line each."""
    return "\n".join(_explain_one(e, root) for e in error.errors() if not _of_another_form(e))


_FORM = re.compile(r"dict\[|constrained-|function-")
"""What pydantic puts into a place for a form that a value may have: one number, or several by name."""


def _of_another_form(e: Any) -> bool:
    """Whether it says of a value that may have two forms that it has not the one that nobody gave it."""
    last = str(e["loc"][-1]) if e["loc"] else ""
    return _FORM.match(last) is not None and isinstance(e["input"], dict) != last.startswith("dict[")


def _explain_one(e: Any, root: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in e["loc"] if not _FORM.match(str(part)))
    if e["type"] == "extra_forbidden":
        section: Any = root
        for part in e["loc"][:-1]:
            section = section_class(section.model_fields[part].annotation)
        last = str(e["loc"][-1])
        if isinstance(e["input"], dict) and not difflib.get_close_matches(last, section.model_fields, cutoff=0.75):
            # A section of another tool's: its keys tell more than its name.
            inner = [(f"{path}.{key}", found) for key in e["input"] if (found := name_elsewhere(str(key), root)) is not None]
            if inner:
                return "\n".join(f"unknown key {key}: did you mean {found}?" for key, found in inner)
        found = suggestion(last, root, section)
        return f"unknown key {path}: " + (f"did you mean {found}?" if found else f"expected one of {', '.join(section.model_fields)}")
    if e["type"] == "missing":
        return f"{path} is missing"
    if e["type"] == "value_error":
        message = str(e["ctx"]["error"])
        return message if not path or message.startswith(path.split(".")[0]) else f"{path}: {message}"
    if e["type"] == "string_pattern_mismatch":  # of `name`
        return f"{path} = {e['input']!r}: expected letters, digits, '.', '_' and '-', the first no '.' or '-': it names a folder"
    if e["type"] == "model_type":
        return f"{path} = {e['input']!r}: expected a section, with its keys below it"
    message = e["msg"][0].lower() + e["msg"][1:]
    if e["type"] == "literal_error":
        meant = other_tools.nearest_value(e["input"], re.findall(r"'([^']*)'", e["ctx"]["expected"]))
        message += f": did you mean {meant}?" if meant else ""
    return f"{path} = {e['input']!r}: {message.replace('input should be', 'expected').replace('a valid tuple', 'a list')}"


def section_class(annotation: Any) -> Any:
    """None where the annotation is of a value."""
    return next((a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _fields(annotation: Any) -> Any:
    """Names in a section; none where the annotation is of a value."""
    return getattr(section_class(annotation), "model_fields", ())


def suggestion(name: str, root: type[BaseModel], section: type[BaseModel] | None = None) -> str | None:
    """What a key that is unknown in `section` (None: that has no section) may mean: a right name with another section, what another
    tool calls so, or a name that is near."""
    fields = (section or root).model_fields
    near = difflib.get_close_matches(name, fields, n=3, cutoff=0.65)
    keys = sections_by_key(root)
    far = [dotted for key in difflib.get_close_matches(name, keys, n=2, cutoff=0.7) for dotted in keys[key]]
    return name_elsewhere(name, root) or " or ".join(near or far) or None


def name_elsewhere(name: str, root: type[BaseModel]) -> str | None:
    """A name that is right in another section, with it; or ours for what another tool calls so."""
    return " or ".join(sections_by_key(root).get(name, ())) or other_tools.ours(name)


def is_key(dotted: str, root: type[BaseModel]) -> bool:
    """Whether there is such a key, e.g. training.steps."""
    section: Any = root.model_fields
    for part in dotted.split("."):
        if part not in section:
            return False
        section = _fields(section[part].annotation)
    return True


def sections_by_key(root: type[BaseModel]) -> dict[str, list[str]]:
    """Key -> the places where there is such a key, in the sections of `root`."""
    places: dict[str, list[str]] = {}
    for section, info in root.model_fields.items():
        for key in _fields(info.annotation):
            places.setdefault(key, []).append(f"{section}.{key}")
    return places


def nearest(name: str, known: Any) -> str:
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"
