"""Tensors out of a PyTorch checkpoint (`torch.save`, zip format) without PyTorch, and without running what a pickle may ask for."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.errors import UserError


class _Type(NamedTuple):
    """An element type by torch's name; nothing that a pickle could call."""

    dtype: Any


_DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
_STORAGES = {name: _Type(dtype) for name, dtype in _DTYPES.items()}


class _Storage(NamedTuple):
    key: str
    dtype: Any


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Call(NamedTuple):
    """Something a pickle may call. No function and no class: a pickle can put attributes on those, and on this it cannot."""

    make: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)


class _State(dict[Any, Any]):
    """An OrderedDict of the file; its attributes (torch keeps version numbers there) are read over."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> None:
        pass


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Call(_State),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(
        lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, tuple(shape), tuple(strides))
    ),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda tensor, *_: tensor),
}
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT",
    "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
    "BINPERSID",
}  # fmt: skip
_LARGEST_PICKLE = 64 << 20  # names and shapes only: a few hundred bytes a tensor


def _check(pickled: bytes) -> None:
    """Refuse a pickle with an instruction that no dictionary of tensors needs, before anything is rebuilt."""
    for opcode, argument, position in pickletools.genops(pickled):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"its pickle has a {opcode.name} at byte {position}, which no dictionary of tensors needs")
        if opcode.name == "GLOBAL":
            _known(*str(argument).split(" ", 1))
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(pickled):  # the table would be made that long
            raise pickle.UnpicklingError(f"its pickle numbers an object {argument}")


def _known(module: str, name: str) -> Any:
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    if (module, name) not in _KNOWN:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, and only tensors are read")
    return _KNOWN[module, name]


class _Unpickler(pickle.Unpickler):
    """Knows tensors and dictionaries; whatever else a pickle names is refused, never imported."""

    def find_class(self, module: str, name: str) -> Any:
        return _known(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, *_ = pid
        if kind != "storage" or not isinstance(storage, _Type):
            raise pickle.UnpicklingError(f"it refers to a {kind!r} outside itself, and only storages are read")
        return _Storage(str(key), storage.dtype)


# What a damaged or a hostile file can raise while it is taken apart.
_FAULTS = (
    zipfile.BadZipFile, zlib.error, StopIteration, pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError,
    AttributeError, OverflowError, NotImplementedError, RecursionError, MemoryError, RuntimeError, OSError,
)  # fmt: skip


class TorchFile:
    """The tensors of a file, read one at a time. A dictionary of them, or one under "model". Raises UserError."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
            pickled = next(name for name in self._zip.namelist() if name.endswith("/data.pkl"))
            content = _Unpickler(io.BytesIO(self._pickle(pickled))).load()
        except _FAULTS as error:
            raise UserError(
                f"{path} is no whole PyTorch checkpoint ({error or 'no data.pkl in it'}): expected a zip of tensors as torch.save writes it"
            ) from None
        self._prefix = pickled.removesuffix("data.pkl")
        tensors = content.get("model", content) if isinstance(content, dict) else None
        if not isinstance(tensors, dict) or not all(isinstance(t, _Tensor) for t in tensors.values()):
            raise UserError(f'{path}: expected a dictionary of tensors, or one under "model"')
        self._tensors: dict[str, _Tensor] = tensors

    def _pickle(self, name: str) -> bytes:
        size = self._zip.getinfo(name).file_size
        if size > _LARGEST_PICKLE:
            raise pickle.UnpicklingError(f"its {name} would be {size} bytes, and {_LARGEST_PICKLE} are far more than names need")
        pickled = self._zip.read(name)
        _check(pickled)
        return pickled

    def keys(self) -> list[str]:
        return list(self._tensors)

    def nbytes(self, name: str) -> int:
        storage, _, shape, _ = self._tensors[name]
        return math.prod(shape) * np.dtype(storage.dtype).itemsize

    def get_tensor(self, name: str) -> jax.Array:
        storage, offset, shape, strides = self._tensors[name]
        entry = f"{self._prefix}data/{storage.key}"
        try:
            info = self._zip.getinfo(entry)
            if info.compress_type != zipfile.ZIP_STORED:  # torch stores; a few compressed bytes could become any number
                raise ValueError(f"{entry} is compressed, which torch.save never does")
            data = np.frombuffer(self._zip.read(entry), storage.dtype)
        except _FAULTS as error:
            raise UserError(f"{self.path}: the data of tensor {name!r} cannot be read ({error}): download it again") from None
        # Strides come from the file: a view beyond the data would read whatever lies in memory there.
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min(offset, *shape, *strides, 0) < 0 or (0 not in shape and max(last, math.prod(shape) - 1) >= data.size):
            raise UserError(
                f"{self.path}: tensor {name!r} (shape {list(shape)}, strides {list(strides)}, offset {offset}) reaches beyond its "
                f"{data.size} stored elements: a damaged file; download it again"
            )
        data, steps = data[offset:], [s * data.itemsize for s in strides]
        return jnp.asarray(np.lib.stride_tricks.as_strided(data, shape, steps, writeable=False))

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
