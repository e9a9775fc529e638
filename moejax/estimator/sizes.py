"""Every array that a training step is given, by arithmetic from the config: weights by dtype, adapters, optimizer, batch. No jax.

The compiler's `argument_size_in_bytes` is their sum, to the byte (tests/estimator/test_memory.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moejax.documents import read_json
from moejax.errors import UserError
from moejax.models.config import Architecture, from_hub_config, specs
from moejax.models.ops.quantized import KINDS

if TYPE_CHECKING:
    from moejax.config import Experiment, TrainingConfig

ITEM = {"float32": 4, "bfloat16": 2}
BLOCK_8BIT, SMALLEST_8BIT = 256, 4096
"""Of moments in 8 bits: numbers of a block; of the smallest parameter that has any."""
AT_ONCE = 2**23
"""Numbers of a weight with moments in 8 bits that are changed at once: both are then in fp32."""
Shape = specs.Shape


@dataclass(frozen=True)
class Stored:
    """A weight or an adapter as it lies in memory. name: of the variable in its module. `parts`: dtype -> bytes; one in 4 bits has
    codes and scales (kind: of `quantized.KINDS`). parameters: how many of PyTorch's it holds, one a layer and expert. host: bytes of the
    parts that lie in the host's memory."""

    module: specs.Path
    name: str
    shape: Shape
    trained: bool
    parts: dict[str, int]
    adapter: bool = False
    parameters: int = 1
    host: Mapping[str, int] = field(default_factory=dict)
    kind: str | None = None

    @property
    def on_device(self) -> dict[str, int]:
        """`parts` without what the host holds."""
        left = {name: size - self.host.get(name, 0) for name, size in self.parts.items()}
        return {name: size for name, size in left.items() if size}

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
        found = experiment.model.architecture(base)
    except (ValueError, KeyError) as error:
        raise UserError(f"model: {error}") from None
    try:
        experiment.check_model(found)
    except ValueError as error:
        raise UserError(str(error)) from None
    return found


def quantized_parts(kind: str, shape: Shape) -> dict[str, int]:
    """Bytes of codes and scales of a weight [..., out, in]."""
    parts, name = KINDS[kind].nbytes(shape), kind.partition("-")[0].upper()
    return {f"{name} codes": parts.pop("codes"), f"{name} scales": sum(parts.values())}


def _in_host(kind: str | None, shape: Shape, parts: dict[str, int]) -> dict[str, int]:
    """What of a weight goes to the host's memory: all of it, but the scales of scales (`moejax.models.build.place`)."""
    if kind is None:
        return parts
    names = quantized_parts(kind, shape)
    return dict(zip(names, (KINDS[kind].nbytes(shape)[part] for part in KINDS[kind].large), strict=True))


def stored(experiment: Experiment, config: Architecture) -> tuple[Stored, ...]:
    """All weights and adapters, stacked over layers as the step gets them."""
    t = experiment.training
    frozen = experiment.adapter is not None
    dtype = t.compute_dtype if frozen else t.stored_dtype
    quantized = {path: kind for group, kind in experiment.kinds(config).items() for path in config.groups.get(group, ())}
    stacks, buffers = {stack.name for stack in config.stacks}, set(config.buffers)
    found, rows = [], _rows_in_host(experiment, config)
    for (*module, name), shape in config.weights.items():
        path, buffer = tuple(module), (*module, name) in buffers
        kind = quantized.get(path) if name == "weight" else None
        own = "float32" if buffer else dtype
        parts = quantized_parts(kind, shape) if kind else {own: math.prod(shape) * ITEM[own]}
        matrix, _ = config.linears.get(path, (None, 0))
        stacked = 0 if path[0] not in stacks else 2 if matrix and matrix.copies else 1
        in_host = rows.get(path, 0) if name == "weight" else 0  # an expert's bias stays on the device
        host = {part: in_host * size // shape[0] for part, size in _in_host(kind, shape, parts).items()} if in_host else {}
        trained = not (frozen or buffer)
        found.append(Stored(path, name, shape, trained, parts, parameters=math.prod(shape[:stacked]), host=host, kind=kind))
    return (*found, *adapters(experiment, config))


def _rows_in_host(experiment: Experiment, config: Architecture) -> dict[specs.Path, int]:
    """Module -> of its weight's first axis, layers or rows of a table, how many lie in the host's memory."""
    p = experiment.placement
    found: dict[specs.Path, int] = {(table,): config.vocab_size for table in ("embed", "head")} if p.tables == "host" else {}
    left = p.on_device(config.expert_layers)
    for stack in config.stacks:
        modules = [path for path in config.groups["experts"] if path[0] == stack.name]
        on_device = min(left, stack.repeats) if modules else 0
        found |= dict.fromkeys(modules, stack.repeats - on_device)
        left -= on_device
    return found


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
                parts, parameters = {"float32": 4 * math.prod(shape)}, math.prod(leading)
                found.append(Stored(path, name, shape, True, parts, adapter=True, parameters=parameters))
    rows = (len(experiment.adapter.token_rows or ()), config.hidden_size)
    if rows[0]:
        tables = ("embed",) if config.tie_word_embeddings else ("embed", "head")
        found += [Stored((table,), "rows", rows, True, {"float32": 4 * math.prod(rows)}, adapter=True) for table in tables]
    return tuple(found)


def in_8_bits(size: int, parameters: int) -> bool:
    """Whether a weight of this many numbers has moments in 8 bits."""
    return size // parameters >= SMALLEST_8BIT


def stacked_in(w: Stored) -> int:
    """Over how many leading axes its parameters are stacked."""
    return next(axes for axes in range(3) if math.prod(w.shape[:axes]) == w.parameters)


def pieces(shape: Shape, stacked: int) -> tuple[int, int]:
    """In how many a weight with moments in 8 bits is changed, one after another: groups of layers, and in a layer parts of each matrix that
    are whole blocks. stacked: over how many leading axes its matrices are."""
    size, layers, matrix = math.prod(shape), shape[0] if stacked else 1, math.prod(shape[stacked:])
    blocks = matrix // BLOCK_8BIT if matrix % BLOCK_8BIT == 0 else 1
    groups = next((n for n in _divisors(layers) if size // n <= AT_ONCE), layers)
    parts = _divisors(blocks)
    return groups, next((n for n in parts if size // groups // n <= AT_ONCE), parts[-1])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, 4096) + 1) if number % n == 0]


def moments(training: TrainingConfig, w: Stored) -> list[tuple[Shape, int]]:
    """The arrays of a weight's state, each with its shape and bytes a number. AdamW: two moments in the weight's dtype or in
    `moments_dtype`; Lion: one. In 8 bits: a byte each, and an fp32 number a block, of small parameters fp32. Adafactor (optax): a row and a
    column of the two largest axes where both reach 128."""
    item = w.bytes // w.size
    if training.optimizer in ("adamw", "lion"):
        item = ITEM[training.moments_dtype] if training.moments_dtype else item
        return [(w.shape, item)] * (2 if training.optimizer == "adamw" else 1)
    if training.optimizer == "adamw_8bit":
        if not in_8_bits(w.size, w.parameters):
            return [(w.shape, 4)] * 2
        return [(w.shape, 1), ((*w.shape[: stacked_in(w)], -(-w.size // w.parameters // BLOCK_8BIT)), 4)] * 2
    axes = sorted(range(len(w.shape)), key=lambda a: w.shape[a])
    if len(axes) >= 2 and w.shape[axes[-2]] >= 128:
        row, column = (w.shape[:a] + w.shape[a + 1 :] for a in (axes[-1], axes[-2]))
        return [(row, item), (column, item), ((1,), item)]
    return [(w.shape, item), ((1,), item), ((1,), item)]


def optimizer_bytes(training: TrainingConfig, trained: tuple[Stored, ...]) -> int:
    """Of all weights' `moments`, and the int32 counts of steps; the step itself is counted with the batch."""
    counts = 1 if training.optimizer == "adamw_8bit" else 2
    return sum(math.prod(shape) * item for w in trained for shape, item in moments(training, w)) + 4 * counts


def batch_bytes(config: Architecture, accumulation: int, rows: int, row_tokens: int) -> int:
    """tokens, targets, loss mask, segments and (where a mixer asks for them) positions, 4 bytes each, and the number of the step."""
    arrays = 4 + any(stack.block.mixer.positional for stack in config.stacks)
    return 4 * arrays * accumulation * rows * row_tokens + 4
