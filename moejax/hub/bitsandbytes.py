"""Checkpoints that bitsandbytes quantized: NF4 codes and scales taken as they are.

Next to a `NAME` of packed codes lie `NAME.absmax`, `NAME.quant_map`, with double quantization `NAME.nested_absmax` and
`NAME.nested_quant_map`, and `NAME.quant_state.bitsandbytes__nf4`: JSON as bytes, with shape, block sizes and the offset of the scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.models.ops import nf4
from moejax.models.ops.quantized import KINDS, Canonical, QuantizedTensor

_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
STATE = ".quant_state.bitsandbytes__"
_STATE_BYTES = 256  # as written here: JSON, and behind it white space
READ_HERE = f"read here are nf4 codes in blocks of {nf4.BLOCK}, their scales in fp32 or in 8 bits in blocks of {nf4.NESTED_BLOCK}"
_ORIGINAL = "Give the original model (bf16, fp16 or fp32)"


class Quantized:
    """Where one quantized matrix is read: it looks like any other source of a tensor (`stored.Source`), but reads as `Canonical`."""

    def __init__(self, name: str, weight: Any, parts: Mapping[str, Any]):
        self.name, self.file = name, weight.file
        self._weight, self._parts = weight, dict(parts)
        self.nbytes = weight.nbytes + sum(parts[p].nbytes for p in (".absmax", ".nested_absmax") if p in parts)
        self.kind = "nf4-double" if ".nested_absmax" in parts else "nf4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, by its quant_state. Raises UserError as `read` does."""
        shape = self._state().get("shape")
        if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
            raise self._bad(f"is of shape {shape!r} by its quant_state: expected a list of sizes")
        return tuple(shape)

    def read(self) -> Canonical:
        """Raises UserError, with file and tensor, for what this NF4 is not."""
        state, shape = self._state(), self.shape
        self._check_setting(state, "blocksize", nf4.BLOCK)
        n = math.prod(shape)
        blocks = -(-n // nf4.BLOCK)
        codes = np.ascontiguousarray(self._weight.read()).reshape(-1).view(np.uint8)  # bitsandbytes may store them as another dtype
        if codes.size != -(-n // 2):
            raise self._bad(f"has {codes.size} bytes of codes, expected {-(-n // 2)} for shape {list(shape)}")
        self._check_map(".quant_map", nf4.CODEBOOK)
        if self.kind == "nf4":
            return Canonical("nf4", shape, {"codes": codes, "absmax": self._part(".absmax", np.float32, blocks)})
        self._check_setting(state, "nested_blocksize", nf4.NESTED_BLOCK)
        self._check_map(".nested_quant_map", nf4.DYNAMIC_MAP)
        offset = state.get("nested_offset")
        if not isinstance(offset, int | float) or not math.isfinite(offset):
            raise self._bad(f"has nested_offset = {offset!r} in its quant_state: expected a number")
        nested = self._part(".nested_absmax", np.float32, -(-blocks // nf4.NESTED_BLOCK))
        parts = {"codes": codes, "absmax": self._part(".absmax", np.uint8, blocks), "nested_absmax": nested, "offset": np.float32(offset)}
        return Canonical("nf4-double", shape, parts)

    def _state(self) -> dict[str, Any]:
        name = next(part for part in self._parts if part.startswith(STATE))
        try:
            state = json.loads(self._parts[name].read().tobytes())
        except ValueError as error:
            raise self._bad(f"has a quant_state that is no JSON ({error})") from None
        if not isinstance(state, dict):
            raise self._bad(f"has a quant_state that is a {type(state).__name__}")
        self._check_setting(state, "quant_type", "nf4")
        return state

    def _check_setting(self, state: dict[str, Any], key: str, expected: object) -> None:
        if state.get(key) != expected:
            raise self._bad(f"has {key} = {state.get(key)!r}: {READ_HERE}. {_ORIGINAL}")

    def _check_map(self, part: str, expected: np.ndarray) -> None:
        if not np.array_equal(self._part(part, np.float32, expected.size), expected):
            raise self._bad(f"has another {part[1:]} than bitsandbytes' own, so its codes mean other numbers. {_ORIGINAL}")

    def _part(self, part: str, dtype: Any, size: int) -> np.ndarray:
        if part not in self._parts:
            raise UserError(f"{self.file.path}: tensor {self.name + part!r} is missing: download the checkpoint again")
        value = self._parts[part].read().reshape(-1)
        if value.dtype != dtype or value.size != size:
            raise UserError(
                f"{self._parts[part].file.path}: tensor {self.name + part!r} holds {value.size} numbers of {value.dtype}, expected "
                f"{size} of {np.dtype(dtype)}"
            )
        if dtype is np.float32 and not np.isfinite(value).all():
            raise UserError(f"{self._parts[part].file.path}: tensor {self.name + part!r} holds NaN or infinity")
        return value

    def _bad(self, what: str) -> UserError:
        return UserError(f"{self.file.path}: tensor {self.name!r} {what}")


def gather(found: Mapping[str, Any]) -> dict[str, Any]:
    """Sources by name, with every quantized matrix and what lies next to it as one `Quantized`. Raises UserError for fp4 and int8."""
    states = {name.partition(STATE)[0]: name for name in found if STATE in name}
    for name in found:
        if name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            raise UserError(f"{found[name].file.path}: tensor {weight!r} is int8, quantized by bitsandbytes: {READ_HERE}. {_ORIGINAL}")
        owner = next((name.removesuffix(part) for part in _PARTS if name.endswith(part)), None)
        if owner is not None and owner not in states:
            raise UserError(
                f"{found[name].file.path}: tensor {name!r} belongs to a quantized matrix, and {owner + STATE + 'nf4'!r} is missing: "
                "download the checkpoint again"
            )
    beside = {name + part for name in states for part in _PARTS} | set(states.values())
    out: dict[str, Any] = {}
    for name, source in found.items():
        if name in states:
            kind = states[name].partition(STATE)[2]
            if kind != "nf4":
                raise UserError(f"{source.file.path}: tensor {name!r} is {kind}, quantized by bitsandbytes: {READ_HERE}. {_ORIGINAL}")
            parts = {key[len(name) :]: found[key] for key in (states[name], *(name + part for part in _PARTS)) if key in found}
            out[name] = Quantized(name, source, parts)
        elif name not in beside:
            out[name] = source
    lost = sorted(states.keys() - found.keys())
    if lost:
        raise UserError(f"{found[states[lost[0]]].file.path}: tensor {lost[0]!r} is missing, its quant_state is there")
    return out


def as_stored(name: str, matrix: Canonical, dtype: Any) -> dict[str, np.ndarray]:
    """A matrix as bitsandbytes saves it: what `gather` reads. dtype: that it was quantized from."""
    parts, double = matrix.parts, "nested_absmax" in matrix.parts
    state = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "dtype": np.dtype(dtype).name, "shape": list(matrix.shape)}
    out = {name: np.asarray(parts["codes"]).reshape(-1, 1), name + ".absmax": parts["absmax"], name + ".quant_map": nf4.CODEBOOK}
    if double:
        state |= {"nested_blocksize": nf4.NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(parts["offset"])}
        out |= {name + ".nested_absmax": parts["nested_absmax"], name + ".nested_quant_map": nf4.DYNAMIC_MAP}
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    return {part: np.asarray(value) for part, value in out.items()} | {f"{name}{STATE}nf4": np.frombuffer(text, np.uint8)}


def stored_shapes(name: str, kind: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shapes and dtypes of what `as_stored` gives for a matrix [out, in] of this kind."""
    parts = {part: np.broadcast_to(np.zeros((), dtype), at) for part, (at, dtype) in KINDS[kind].parts(shape, canonical=True).items()}
    return {part: (value.shape, value.dtype) for part, value in as_stored(name, Canonical(kind, shape, parts), np.float32).items()}


def check(files: Mapping[str, Any], wanted: Iterable[tuple[str, Any, str | None]]) -> None:
    """Whether the model stores each tensor (name, abstract value, what quantization.modules calls its part of the model) as a checkpoint
    that bitsandbytes quantized does.

    Raises UserError with the settings that do. A checkpoint without quantized matrices is not looked at.
    """
    if not any(isinstance(source, Quantized) for source in files.values()):
        return
    for name, value, module in wanted:
        source = files.get(name)
        ours, theirs = isinstance(value, QuantizedTensor), isinstance(source, Quantized)
        if source is None:
            continue
        where = f"{source.file.path}: tensor {name!r}"
        if ours and not theirs:
            raise UserError(
                f"{where} is not quantized, as the rest of this checkpoint is, and quantization.modules would quantize it: leave "
                f"{module} out of quantization.modules, or give the original model"
            )
        if theirs and not ours:
            remedy = f"set quantization.format=nf4 and quantization.modules with {module}" if module else _ORIGINAL.lower()
            raise UserError(f"{where} is quantized to NF4, and this model keeps it unquantized: {remedy}")
        if isinstance(source, Quantized) and source.kind != value.kind:
            scales, double = ("8-bit", "true") if source.kind == "nf4-double" else ("fp32", "false")
            raise UserError(f"{where} has {scales} scales: set quantization.double={double}")
