"""Files damaged as disks, networks and people damage them: their bytes, or the documents in them."""

import copy
import gzip
import json
import random
from contextlib import suppress
from typing import Any

import yaml

STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "\x00", "a" * 5000, "1e999",
    "../../etc/passwd", "\ud800", "é", [], {}, [[]], [None], {"": None}, [[[[[[]]]]]], {"a": {"b": {"c": {}}}},
]  # fmt: skip


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    found: list[tuple[Any, Any]] = []
    stack = [content]
    while stack:
        inside = stack.pop()
        keys = inside.keys() if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        found += [(inside, key) for key in keys]
        stack += [inside[key] for key in keys if isinstance(inside[key], dict | list)]
    return found


def damaged_document(content: Any, rng: random.Random) -> Any:
    """A value replaced, removed, renamed or doubled, once or a few times."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = places(content)
        if not at:
            return rng.choice(STRANGE)
        inside, key = rng.choice(at)
        kind = rng.randrange(5)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[str(key) + rng.choice(("x", " ", "\x00", "é"))] = inside.pop(key)
        elif kind == 2:
            other, where = rng.choice(at)
            with suppress(KeyError, IndexError):  # it may be gone
                inside[key] = copy.deepcopy(other[where])
        else:
            inside[key] = copy.deepcopy(rng.choice(STRANGE))
    return content


def damaged_bytes(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Bits turned, pieces lost, doubled, exchanged or from another file, a cut, zeros as after a power cut, other numbers."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        first, second = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        short = min(second, first + rng.choice((1, 2, 8, 64)))
        match rng.randrange(9):
            case 0 if data:
                at = rng.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case 1:
                data = data[:first]
            case 2:
                data = data[:first] + data[short:]
            case 3:
                data = data[:short] + data[first:short] * rng.choice((1, 2, 50)) + data[short:]
            case 4:
                data = data[:first] + bytes(short - first) + data[short:]
            case 5:
                data = data[:first] + bytes(len(data) - first)
            case 6:
                at = rng.randrange(len(other) + 1)
                data = data[:first] + other[at : at + rng.choice((4, 64, 1024))] + data[first:]
            case 7:
                data = data[:first] + rng.randbytes(rng.choice((1, 4, 16))) + data[short:]
            case _:
                digits = [i for i in range(first, second) if data[i : i + 1].isdigit()][:1]
                for at in digits:
                    data = data[:at] + rng.choice((b"-1", b"999999999999999999999", b"1e999", b"NaN", b"0", b"0x10")) + data[at + 1 :]
    return data


def damaged(name: str, data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A file's bytes, damaged as bytes or, where they are a document, as one."""
    if name.endswith(".gz") and rng.random() < 0.8:
        return gzip.compress(damaged(name.removesuffix(".gz"), gzip.decompress(data), gzip.decompress(other), rng), 1)
    if rng.random() < 0.5:
        return damaged_bytes(data, other, rng)
    if name.endswith(".json"):
        return json.dumps(damaged_document(json.loads(data), rng)).encode("utf-8", "surrogatepass")
    if name.endswith((".yaml", ".yml")):
        with suppress(yaml.YAMLError, ValueError):  # what YAML cannot write
            return yaml.safe_dump(damaged_document(yaml.safe_load(data), rng)).encode("utf-8", "surrogatepass")
    if name.endswith(".jsonl"):
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(damaged_document(json.loads(lines[at]), rng)).encode("utf-8", "surrogatepass")
        return b"\n".join(lines)
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(damaged_document(json.loads(data[8 : 8 + length]), rng)).encode("utf-8", "surrogatepass")
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return damaged_bytes(data, other, rng)
