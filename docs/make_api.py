"""docs/api.md's reference, from the docstrings' first paragraphs. `python docs/make_api.py`; a test holds the page against it."""

import inspect
import re
from pathlib import Path
from typing import Any

import moejax

PAGE = Path(__file__).parent / "api.md"
HEAD = "Made by `python docs/make_api.py`. Arguments, shapes, units and errors: `help(moejax.train)` and so on.\n"


def signature(thing: Any) -> str:
    """Arguments with their defaults and the result's type, of this package or of Python, by its own name."""
    found = inspect.signature(thing)
    own = [p.replace(annotation=p.empty) for name, p in found.parameters.items() if name != "self"]
    result = f" -> {found.return_annotation}" if found.return_annotation not in (None, "None", "Any") else ""
    return str(found.replace(parameters=own, return_annotation=found.empty)) + re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", result)


def entry(name: str, thing: Any, level: int) -> str:
    """A heading, the signature of what is called, the docstring's first paragraph."""
    what = f"{'#' * level} `{name}`\n\n"
    if inspect.isfunction(thing):
        what += f"```python\n{name}{signature(thing)}\n```\n\n"
    return what + inspect.cleandoc(thing.__doc__ or "").partition("\n\n")[0] + "\n"


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
