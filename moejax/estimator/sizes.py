"""Every array that a training step is given, by arithmetic from the config: weights by dtype, adapters, optimizer, batch. No jax.

The compiler's `argument_size_in_bytes` is their sum, to the byte (tests/estimator/test_memory.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moejax.documents import read_json
from moejax.errors import UserError
from moejax.models.config import Architecture, from_hub_config, specs
from moejax.models.ops.quantized import KINDS

if TYPE_CHECKING:
    from moejax.config import Experiment

ITEM = {"float32": 4, "bfloat16": 2}
Shape = specs.Shape


@dataclass(frozen=True)
class Stored:
    """A weight or an adapter as it lies in memory. name: of the variable in its module. `parts`: dtype -> bytes; one in 4 bits has
    codes and scales."""

    module: specs.Path
    name: str
    shape: Shape
    trained: bool
    parts: dict[str, int]
    adapter: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def storage(self) -> str:
        """For people: "float32", or "NF4" in its parts' place."""
        return " ".join(dict.fromkeys(part.partition(" ")[0] for part in self.parts))


def model_folder(experiment: Experiment) -> Path | None:
    """Where the base lies, if it is a folder here."""
    source = experiment.model.source
    return Path(source) if source and Path(source).is_dir() else None


def architecture_of(experiment: Experiment) -> Architecture:
    """The sizes of a config's model: of its folder where it is one, else of its preset; nothing is fetched."""
    source = experiment.model.source
    file = Path(source or "", "config.json")
    content = read_json(file) if source and file.is_file() else None
    try:
        base = None if content is None else from_hub_config(content, experiment.model.ignored_settings)
        return experiment.model.architecture(base)
    except (ValueError, KeyError) as error:
        raise UserError(f"model: {error}") from None


def quantized_parts(kind: str, shape: Shape) -> dict[str, int]:
    """Bytes of codes and scales of a weight [..., out, in]."""
    parts, name = KINDS[kind].nbytes(shape), kind.partition("-")[0].upper()
    return {f"{name} codes": parts.pop("codes"), f"{name} scales": sum(parts.values())}


def stored(experiment: Experiment, config: Architecture) -> tuple[Stored, ...]:
    """All weights and adapters, stacked over layers as the step gets them."""
    t, q = experiment.training, experiment.quantization
    frozen = experiment.adapter is not None
    dtype = t.compute_dtype if frozen else t.stored_dtype
    quantized = {path for module in config.resolve_groups(q.modules) for path in config.groups.get(module, ())}
    found = []
    for (*module, name), shape in config.weights.items():
        path, parts = tuple(module), {dtype: math.prod(shape) * ITEM[dtype]}
        if q.kind and path in quantized and name == "weight":
            parts = quantized_parts(q.kind, shape)
        found.append(Stored(path, name, shape, not frozen, parts))
    return (*found, *adapters(experiment, config))


def adapters(experiment: Experiment, config: Architecture) -> tuple[Stored, ...]:
    """LoRA pairs A [..., R, in], if it is not another's, and B [..., out, R], and trained rows of tokens, fp32."""
    if experiment.adapter is None:
        return ()
    shapes, found = config.weights, []
    for target, pair in experiment.adapter.lora.of(config).items():
        for path in config.targets[target]:
            *leading, out, inner = shapes[*path, "weight"]
            own_a = [("a", (pair.rank, inner))] if pair.shares is None else []
            for name, matrix in (*own_a, ("b", (out, pair.rank))):
                shape = (*leading, *matrix)
                found.append(Stored(path, name, shape, True, {"float32": 4 * math.prod(shape)}, adapter=True))
    rows = (len(experiment.adapter.token_rows or ()), config.hidden_size)
    if rows[0]:
        tables = ("embed",) if config.tie_word_embeddings else ("embed", "head")
        found += [Stored((table,), "rows", rows, True, {"float32": 4 * math.prod(rows)}, adapter=True) for table in tables]
    return tuple(found)


def optimizer_bytes(optimizer: str, trained: tuple[Stored, ...]) -> int:
    """AdamW: two moments in the weights' dtype. Adafactor (optax): a row and a column of the two largest axes where both reach 128.

    Each has its int32 counts of steps; the step itself is counted with the batch.
    """
    if optimizer == "adamw":
        return sum(2 * s.bytes for s in trained) + 2 * 4
    total = 2 * 4
    for s in trained:
        item = s.bytes // s.size
        axes = sorted(range(len(s.shape)), key=lambda a: s.shape[a])
        if len(axes) >= 2 and s.shape[axes[-2]] >= 128:
            total += item * (s.size // s.shape[axes[-1]] + s.size // s.shape[axes[-2]] + 1)
        else:
            total += item * (s.size + 2)
    return total


def batch_bytes(config: Architecture, accumulation: int, rows: int, row_tokens: int) -> int:
    """tokens, targets, loss mask, segments and (where a mixer asks for them) positions, 4 bytes each, and the number of the step."""
    arrays = 4 + any(stack.block.mixer.positional for stack in config.stacks)
    return 4 * arrays * accumulation * rows * row_tokens + 4
