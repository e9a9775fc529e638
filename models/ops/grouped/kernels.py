"""Pallas kernels for GPUs (Triton's lowering) of rows sorted by expert: times each expert's matrix, times its transpose, and the sum over a
group's rows. A matrix in 4 bits is decoded tile by tile where it is multiplied.

A program is a tile of one expert's rows, masked to the group, and a block of the result's columns. It goes through what is summed over,
with codes one tile ahead. A sum with few programs is cut into parts that XLA adds up: no atomics, the same bits every time. Rows of no
expert are not written.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.models.ops.choice import DECODED_TILE
from moejax.models.ops.quantized import KINDS, tensor_type

ROWS, MOST_ROWS = 16, DECODED_TILE
"""Of a tile of rows, at least, and at most where codes are decoded for it."""
OUT, INNER = 64, 64
"""Rows and columns of a tile of a matrix; of one in 4 bits 64 bytes are two tiles, one of each half of its row."""
LARGE, LARGE_INNER = 128, 32
"""Of arrays, with many rows: both sides of the result's tile, and the tile's other side."""
EXACT = 32
"""In fp32, which no tensor core multiplies exactly, every side of a tile."""
PROGRAMS, STEPS = 128, 4
"""With fewer programs what is summed over is cut into parts of at least so many tiles."""
WARPS, LARGE_WARPS = 4, 8
"""Of codes with tiles twice as high and 8 warps: as many instructions a weight, but only one program a multiprocessor by its registers."""
STAGES = 4
"""Tiles of arrays on their way."""


class Stack(NamedTuple):
    """Matrices [L, E, O, I] of which entry `layer` is meant. kind: of `KINDS`, or "" for an array.

    parts: arrays with [L, E] first: an array, or codes in halves and the other parts, flat.
    """

    kind: str
    shape: tuple[int, int, int]  # E, O, I
    parts: tuple[tuple[str, jax.Array], ...]
    layer: jax.Array  # int32 [1]

    @property
    def tables(self) -> tuple[Any, ...]:
        return tensor_type(self.kind).tables if self.kind else ()

    def matrix(self, dtype: Any, rows: int, transposed: bool) -> _Matrix:
        return _Matrix(self.kind, self.shape[1:], jnp.dtype(dtype), tuple(name for name, _ in self.parts), rows, transposed)


class Tiles(NamedTuple):
    """Rows [M] sorted by expert, in tiles of `rows`. starts: int32 [E + 1], the first row of each group, and the end of the last; places:
    int32 [3, S], of each tile the expert, the first row, and where the expert's rows end; of one that there is not, nothing is between."""

    starts: jax.Array
    places: jax.Array
    rows: int

    @classmethod
    def of(cls, sizes: jax.Array, count: int, dtype: Any, most: int) -> Tiles:
        """sizes: int32 [E]; count: M; most: rows of a tile."""
        experts = sizes.shape[0]
        rows = _rows_of_tile(count / experts, EXACT if jnp.dtype(dtype) == jnp.float32 else most)
        ends, tiles = jnp.cumsum(sizes), -(-sizes // rows)
        last = jnp.cumsum(tiles)
        number = jnp.arange(min(experts, count) + count // rows)
        e = jnp.minimum(jnp.sum(number[:, None] >= last, axis=1), experts - 1)
        first = ends[e] - sizes[e] + (number - last[e] + tiles[e]) * rows
        places = jnp.stack([e, first, jnp.where(number < last[-1], ends[e], first)])
        return cls(jnp.pad(ends, (1, 0)).astype(jnp.int32), places.astype(jnp.int32), rows)


def _rows_of_tile(mean: float, most: int) -> int:
    """That hold nearly every group of a random routing, if they are few."""
    wanted = 1 << max(int(mean + 2 * math.sqrt(mean)) - 1, 1).bit_length()
    return max(ROWS, min(wanted, most))


def _side(most: int, size: int, dtype: Any) -> int:
    """Of a tile along an axis of this size: a power of two, as Triton has them, and at least what its products take."""
    return min(EXACT if jnp.dtype(dtype) == jnp.float32 else most, max(16, 1 << max(size - 1, 1).bit_length()))


def _from(start: Any, count: int) -> jax.Array:
    return start + jnp.arange(count, dtype=jnp.int32)


class _Matrix(NamedTuple):
    """What a kernel knows of one expert's matrix [out, inner] before it runs. names: of its parts; rows: of the tiles that it multiplies;
    transposed: it multiplies from the other side."""

    kind: str
    shape: tuple[int, int]
    dtype: Any
    names: tuple[str, ...]
    rows: int
    transposed: bool

    @property
    def is_large(self) -> bool:
        return not self.kind and self.rows >= LARGE

    @property
    def columns(self) -> int:
        """Of what is stored: bytes of codes, or numbers."""
        return -(-self.shape[1] // 2) if self.kind else self.shape[1]

    @property
    def tile(self) -> tuple[int, int]:
        height, width = OUT, min(INNER, KINDS[self.kind].block) if self.kind else INNER
        if self.is_large:
            height, width = (LARGE_INNER, LARGE) if self.transposed else (LARGE, LARGE_INNER)
        return _side(height, self.shape[0], self.dtype), _side(width, self.columns, self.dtype)

    @property
    def is_whole(self) -> bool:
        """Made of whole tiles."""
        (out, inner), (rows, width) = self.shape, self.tile
        return out % rows == 0 and inner % ((1 + bool(self.kind)) * width) == 0

    def starts(self, j: Any) -> list[Any]:
        """The first columns of the tiles that are stored at column (or byte) j."""
        return [j, j + self.columns] if self.kind else [j]

    @property
    def ends(self) -> list[int]:
        """Where the columns of each of `starts` end: behind the first half's is the other."""
        return [self.columns, self.shape[1]][-1 - bool(self.kind) :]

    def read(self, refs: dict[str, Any], o: Any, j: Any) -> jax.Array:
        """What is stored at row o and column (or byte) j."""
        import jax.experimental.pallas as pl
        from jax.experimental.pallas import triton

        rows, width = self.tile
        ref = refs[self.names[0]]
        at = ref.at[(*refs["where"], pl.ds(o, rows), pl.ds(j, width))]
        if self.is_whole:
            return triton.load(at)  # type: ignore[no-any-return]
        inside = (_from(o, rows) < self.shape[0])[:, None] & (_from(j, width) < self.columns)
        return triton.load(at, mask=inside, other=jnp.zeros((), ref.dtype))  # type: ignore[no-any-return]

    def tiles(self, refs: dict[str, Any], stored: jax.Array, o: Any, j: Any) -> list[jax.Array]:
        """`stored` as numbers, a tile for each of `starts`; zero outside of the matrix."""
        if not self.kind:
            return [stored]
        codes = stored.astype(jnp.int32)
        halves = zip((codes >> 4, codes & 15), self.starts(j), self.ends, strict=True)
        return [self._decoded(refs, code, o, start, end) for code, start, end in halves]

    def _decoded(self, refs: dict[str, Any], code: jax.Array, o: Any, start: Any, end: int) -> jax.Array:
        (out, inner), (rows, width), block, form = self.shape, self.tile, KINDS[self.kind].block, tensor_type(self.kind)
        row, column = _from(o, rows), _from(start, width)
        if self.is_whole and self.columns % block == 0 and block % width == 0:  # a row of the tile has one scale
            blocks = (row * (inner // block) + start // block)[:, None]
        else:
            blocks = jnp.minimum((row[:, None] * inner + column) // block, -(-out * inner // block) - 1)
        parts = {name: partial(_entry, refs, name) for name in self.names[1:]}
        value = form.values(code, form.scales_at(parts, refs["tables"], blocks), refs["tables"], self.dtype)
        if self.is_whole:
            return value  # type: ignore[no-any-return]
        return jnp.where((row < out)[:, None] & (column < end), value, jnp.zeros((), value.dtype))


def _entry(refs: dict[str, Any], name: str, index: Any) -> Any:
    return refs[name][(*refs["where"], index)]


def _rows(ref: Any, row: Any, live: jax.Array, start: Any, width: int, is_whole: bool) -> jax.Array:
    """[rows, width] of rows [M, columns] from a row and column on, zero where they are of another expert or there is no column. is_whole:
    there always is."""
    import jax.experimental.pallas as pl
    from jax.experimental.pallas import triton

    inside = live[:, None] if is_whole else live[:, None] & (_from(start, width) < ref.shape[1])
    return triton.load(  # type: ignore[no-any-return]
        ref.at[pl.ds(row, live.shape[0]), pl.ds(start, width)], mask=inside, other=jnp.zeros((), ref.dtype)
    )


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """fp32, of fp32 operands exact products: a GPU would round them to tf32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _product(matrix: _Matrix, steps: int, places: Any, layer: Any, x: Any, *others: Any) -> None:
    """x Wᵀ, or x W. steps: tiles of the sum that a part has."""
    import jax.experimental.pallas as pl
    from jax.experimental.pallas import triton

    *weights, y = others
    tile, block, summand = (pl.program_id(axis) for axis in range(3))
    e, row, end = (places[n, tile] for n in range(3))
    live = _from(row, matrix.rows) < end
    parts, tables = weights[: len(matrix.names)], weights[len(matrix.names) :]
    refs = dict(zip(matrix.names, parts, strict=True)) | {"tables": tables, "where": (layer[0], e)}
    (out, _), (height, width), transposed = matrix.shape, matrix.tile, matrix.transposed
    count = -(-out // height) if transposed else -(-matrix.columns // width)
    begin = summand * steps
    stop = jnp.where(row < end, jnp.minimum(begin + steps, count), begin)

    def place(k: Any) -> tuple[Any, Any]:
        return (k * height, block * width) if transposed else (block * height, k * width)

    def add(k: Any, sums: list[jax.Array], stored: jax.Array) -> list[jax.Array]:
        o, j = place(k)
        tiles = matrix.tiles(refs, stored, o, j)
        if transposed:
            taken = _rows(x, row, live, o, height, matrix.is_whole)
            return [s + _dot(taken, w, (1, 0)) for s, w in zip(sums, tiles, strict=True)]
        for start, w in zip(matrix.starts(j), tiles, strict=True):
            sums = [sums[0] + _dot(w, _rows(x, row, live, start, width, matrix.is_whole), (1, 1))]
        return sums

    def ahead(k: Any, carry: Any) -> Any:
        sums, stored = carry
        following = matrix.read(refs, *place(jnp.minimum(k + 1, stop - 1)))
        return add(k, sums, stored), following

    def at_once(k: Any, sums: list[jax.Array]) -> list[jax.Array]:
        return add(k, sums, matrix.read(refs, *place(k)))

    o, j = place(0)
    firsts, ends, side = (matrix.starts(j), matrix.ends, width) if transposed else ([o], [out], height)
    sums: Any = [jnp.zeros((matrix.rows, side) if transposed else (side, matrix.rows), jnp.float32) for _ in firsts]
    if matrix.kind:
        sums, _ = jax.lax.fori_loop(begin, stop, ahead, (sums, matrix.read(refs, *place(begin))))
    else:  # Triton has the next ones on their way
        sums = jax.lax.fori_loop(begin, stop, at_once, sums)
    for first, limit, found in zip(firsts, ends, sums, strict=True):
        inside = live[:, None] if matrix.is_whole else live[:, None] & (_from(first, side) < limit)
        found = found if transposed else found.T
        triton.store(y.at[summand, pl.ds(row, matrix.rows), pl.ds(first, side)], found.astype(y.dtype), mask=inside)


def _gradient(rows, starts, dy, x, dw):  # type: ignore[no-untyped-def]
    import jax.experimental.pallas as pl
    from jax.experimental.pallas import triton

    height, width = (_side(INNER, ref.shape[1], dy.dtype) for ref in (dy, x))
    o, i, e = pl.program_id(0) * height, pl.program_id(1) * width, pl.program_id(2)
    first, end = starts[e], starts[e + 1]

    def tile(k: Any, found: jax.Array) -> jax.Array:
        row = first + k * rows
        live = _from(row, rows) < end
        parts = ((dy, o, height), (x, i, width))
        a, b = (_rows(ref, row, live, start, side, ref.shape[1] % side == 0) for ref, start, side in parts)
        return found + _dot(a, b, (0, 0))

    found = jax.lax.fori_loop(0, (end - first + rows - 1) // rows, tile, jnp.zeros((height, width), jnp.float32))
    inside = (_from(o, height) < dy.shape[1])[:, None] & (_from(i, width) < x.shape[1])
    triton.store(dw.at[e, pl.ds(o, height), pl.ds(i, width)], found, mask=inside)


def _called(
    kernel: Any, name: str, grid: tuple[int, ...], shape: tuple[int, ...], dtype: Any, *operands: Any,
    warps: int = WARPS, stages: int = STAGES,
) -> jax.Array:  # fmt: skip
    """One launch; on a CPU interpreted."""
    from jax.experimental import pallas as pl  # at import it would cost every start
    from jax.experimental.pallas import triton

    def call(interpret: bool, *operands: Any) -> Any:
        return pl.pallas_call(
            kernel, grid=grid, out_shape=jax.ShapeDtypeStruct(shape, dtype), interpret=interpret, name=name,
            compiler_params=None if interpret else triton.CompilerParams(num_warps=warps, num_stages=stages),
        )(*operands)  # fmt: skip

    found: jax.Array = jax.lax.platform_dependent(*operands, cpu=partial(call, True), default=partial(call, False))
    return found


def product(rows: jax.Array, w: Stack, tiles: Tiles, *, transposed: bool = False) -> jax.Array:
    """Rows [M, I], each times its expert's matrix: [M, O]; transposed: [M, O] -> [M, I]."""
    matrix, (_, out, inner) = w.matrix(rows.dtype, tiles.rows, transposed), w.shape
    height, width = matrix.tile
    of_rows, of_columns = -(-out // height), -(-matrix.columns // width)
    blocks, count = (of_columns, of_rows) if transposed else (of_rows, of_columns)
    parts = max(1, min(PROGRAMS // (blocks * tiles.places.shape[1]), count // STEPS))
    steps = -(-count // parts)
    parts = -(-count // steps)
    name = f"{'decode' if w.kind else 'grouped'}_{'backward' if transposed else 'forward'}"
    found = _called(
        partial(_product, matrix, steps), name, (tiles.places.shape[1], blocks, parts),
        (parts, rows.shape[0], inner if transposed else out), rows.dtype if parts == 1 else jnp.float32,
        tiles.places, w.layer, rows, *(a for _, a in w.parts), *map(jnp.asarray, w.tables),
        warps=LARGE_WARPS if matrix.is_large else WARPS, stages=1 if w.kind else STAGES,
    )  # fmt: skip
    return found[0] if parts == 1 else jnp.sum(found, axis=0).astype(rows.dtype)


def gradient(dy: jax.Array, rows: jax.Array, tiles: Tiles) -> jax.Array:
    """dyᵀ x of every group: [M, O], [M, I] -> fp32 [E, O, I]."""
    experts, shape = tiles.starts.shape[0] - 1, (dy.shape[1], rows.shape[1])
    blocks = (-(-size // _side(INNER, size, dy.dtype)) for size in shape)
    return _called(
        partial(_gradient, min(tiles.rows, INNER)), "grouped_gradient", (*blocks, experts), (experts, *shape), jnp.float32,
        tiles.starts, dy, rows,
    )  # fmt: skip
