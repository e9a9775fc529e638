"""YAML files that users bring: read whole, or one message that says what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from moejax.documents import without_advice
from moejax.errors import UserError


def read_yaml(path: Path, given: str = "") -> Any:
    """What a YAML file holds, None where it is empty. given: what named it (an option, with a space behind it).

    Raises UserError for a file that cannot be read or is no YAML, and for a key that stands twice.
    """
    where = f"{given}{path}"
    try:
        return parse_yaml(path.read_bytes())  # bytes: a byte-order mark says which Unicode it is
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.position}): save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", error))
        tab = " (a tab: YAML is indented with spaces)" if "'\\t'" in problem else ""
        raise UserError(f"{where}{line}: not valid YAML: {problem}{tab}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be read") from None
    except ValueError as error:  # a date that does not exist, a number of thousands of digits
        raise UserError(f"{where}: a value that YAML cannot read: {without_advice(error)}; put it in quotes if it is a text") from None


def parse_yaml(text: str | bytes) -> Any:
    """What YAML text holds: plain values alone. Raises YAMLError or ValueError, also where a key stands twice, and where aliases make
    more than VALUES values of it: each may be looked at, and shown, one by one."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > VALUES:
            problem = f"its aliases (*NAME) make more than {VALUES:,} values of it"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return loader.construct_document(node)
    finally:
        loader.dispose()


VALUES = 100_000


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node is, each alias counted as what it stands for. An alias of what it stands in: without end."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        inside = (part for item in node.value for part in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_values(part, known) for part in inside)
    return known[id(node)]


class _Loader(yaml.SafeLoader):
    """YAML's own takes the last of two equal keys: the first, a whole section perhaps, would be lost without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands in it twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
