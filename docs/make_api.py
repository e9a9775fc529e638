"""docs/api.md's reference, from the docstrings. `python docs/make_api.py`; a test holds the page against it."""

import inspect
import re
from pathlib import Path
from typing import Any

import moejax

PAGE = Path(__file__).parent / "api.md"
HEAD = "Made from the docstrings by `python docs/make_api.py`.\n"


class Written(str):
    """An annotation as its source has it, without the modules of types."""

    def __repr__(self) -> str:
        return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", self)


def signature(thing: Any) -> str:
    found = inspect.signature(thing)
    own = [p.replace(annotation=Written(p.annotation)) for name, p in found.parameters.items() if name != "self"]
    return str(found.replace(parameters=own, return_annotation=Written(found.return_annotation)))


def entry(name: str, thing: Any, level: int) -> str:
    """A heading, the signature of what is called, the docstring."""
    what = f"{'#' * level} `{name}`\n\n"
    if inspect.isfunction(thing):
        what += f"```python\n{name}{signature(thing)}\n```\n\n"
    return what + inspect.cleandoc(thing.__doc__ or "") + "\n"


def reference() -> str:
    parts = []
    for name in moejax.__all__:
        thing = getattr(moejax, name)
        parts.append(entry(name, thing, 3))
        if inspect.isclass(thing):
            methods = [(key, value) for key, value in vars(thing).items() if key[0] != "_" and inspect.isfunction(value)]
            parts += [entry(f"{name}.{key}", value, 4) for key, value in methods]
    return "\n".join(parts)


def page() -> str:
    written = PAGE.read_text(encoding="utf-8")
    return written[: written.index(HEAD) + len(HEAD)] + "\n" + reference()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
