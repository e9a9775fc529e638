"""Tensors out of a PyTorch checkpoint (`torch.save`, zip format) without PyTorch, and without running what a pickle may ask for.

The pickle is interpreted here, never unpickled: of its instructions only those that tensors need, of its globals only the names in
`_CALLS` and `_STORAGES`, and a call is one of our own functions with checked arguments.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.errors import UserError
from moejax.files import lfs_pointer

_STORAGES: dict[str, Any] = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
_DAMAGED = (
    zipfile.BadZipFile, struct.error, StopIteration, OSError, RuntimeError, ValueError, IndexError, KeyError, TypeError, EOFError,
    OverflowError,
)  # fmt: skip
"""What a file that is cut, damaged or made to deceive raises on its way through zipfile and the interpreter."""


_LARGEST_PICKLE = 64 << 20  # names and shapes only: a few hundred bytes a tensor


class _Global(NamedTuple):
    """A name that is allowed, as a value: it can be called by REDUCE and named in a storage, nothing else."""

    module: str
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: Any


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _ordered_dict(*arguments: Any) -> dict[str, Any]:
    if arguments:
        raise ValueError("an OrderedDict is made with arguments, and only empty ones are")
    return {}


def _rebuild_tensor(storage: Any = None, offset: Any = None, shape: Any = None, strides: Any = None, *_: Any) -> _Tensor:
    sizes = (*shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else (None,)
    if not isinstance(storage, _Storage) or any(type(n) is not int for n in (offset, *sizes)) or len(shape) != len(strides):
        raise ValueError("a tensor is rebuilt from other things than a storage, an offset, a shape and as many strides")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any = None, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise ValueError(f"a parameter is rebuilt from a {type(tensor).__name__}, and only tensors are read")
    return tensor


_CALLS: dict[_Global, Callable[..., Any]] = {
    _Global("collections", "OrderedDict"): _ordered_dict,
    _Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    _Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _global(module: Any, name: Any) -> _Global:
    known = _Global(module, name)
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("it names a global by something other than two strings")
    if known not in _CALLS and not (module == "torch" and name in _STORAGES):
        raise ValueError(f"it holds a {module}.{name}, and only tensors are read")
    return known


def _storage(pid: Any) -> _Storage:
    """("storage", type, key, device, elements), as torch.save names the data of a tensor."""
    if not isinstance(pid, tuple) or len(pid) < 3 or not isinstance(pid[1], _Global) or pid[1].name not in _STORAGES:
        raise ValueError("a tensor's data is named by something other than a storage type and a key")
    return _Storage(str(pid[2]) if isinstance(pid[2], str | int) else "", _STORAGES[pid[1].name])


_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_NUMBERS_AND_TEXTS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")


def _interpret(data: bytes) -> Any:
    """The value of a pickle. Raises ValueError for whatever tensors do not need, by name."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any

    def pop(count: int) -> list[Any]:
        if len(stack) < count:
            raise ValueError("its pickle takes more than it has put")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def pop_to_mark() -> list[Any]:
        if not marks:
            raise ValueError("its pickle lacks a mark")
        return pop(max(0, len(stack) - marks.pop()))

    for op, argument, _ in pickletools.genops(data):
        match op.name:
            case "PROTO" | "FRAME":
                continue
            case "MARK":
                marks.append(len(stack))
                continue
            case "STOP":
                return pop(1)[0]
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                (value,) = pop(1)
                memo[len(memo) if argument is None else argument] = value
            case "BINGET" | "LONG_BINGET":
                value = memo[argument]
            case "SETITEM" | "SETITEMS":
                pairs = pop(2) if op.name == "SETITEM" else pop_to_mark()
                (value,) = pop(1)
                keys = pairs[::2]
                if not isinstance(value, dict) or len(pairs) % 2 or not all(isinstance(key, str | int) for key in keys):
                    raise ValueError("its pickle fills something other than a dictionary with names")
                value.update(zip(keys, pairs[1::2], strict=True))
            case "APPEND" | "APPENDS":
                items = pop(1) if op.name == "APPEND" else pop_to_mark()
                (value,) = pop(1)
                if not isinstance(value, list):
                    raise ValueError(f"its pickle appends to a {type(value).__name__}")
                value.extend(items)
            case "BUILD":  # a state_dict's own _metadata: versions of modules, not needed
                value, _ = pop(2)
                if not isinstance(value, dict):
                    raise ValueError(f"its pickle sets the state of a {type(value).__name__}, and only tensors are read")
            case "TUPLE":
                value = tuple(pop_to_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                value = tuple(pop(int(op.name[-1])))
            case "GLOBAL" | "INST":
                value = _global(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                value = _global(*pop(2))
            case "BINPERSID":
                value = _storage(pop(1)[0])
            case "REDUCE":
                function, arguments = pop(2)
                if not isinstance(function, _Global) or function not in _CALLS or not isinstance(arguments, tuple):
                    raise ValueError("its pickle calls something that rebuilds no tensor")
                value = _CALLS[function](*arguments)
            case name if name in _MADE:
                value = _MADE[name]()
            case name if name in _NUMBERS_AND_TEXTS:
                value = argument
            case name:
                raise ValueError(f"its pickle uses the instruction {name}, which tensors do not need")
        stack.append(value)
    raise ValueError("its pickle has no end")


class TorchFile:
    """The tensors of a file, read one at a time. A dictionary of them, or one under "model". Raises UserError."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
            pickled = next((name for name in self._zip.namelist() if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise ValueError("no data.pkl in it")
            self._prefix = pickled.removesuffix("data.pkl")
            if f"{self._prefix}byteorder" in self._zip.namelist() and self._read("byteorder") != b"little":
                raise ValueError("its numbers are not little-endian")
            content = _interpret(self._read("data.pkl"))
        except _DAMAGED as error:
            if hasattr(self, "_zip"):
                self._zip.close()
            what = lfs_pointer(path) or f"is no whole PyTorch checkpoint ({error}): expected a zip of tensors as torch.save writes it"
            raise UserError(f"{path} {what}") from None
        tensors = content.get("model", content) if isinstance(content, dict) else None
        if not isinstance(tensors, dict):
            raise UserError(f'{path}: expected a dictionary of tensors, or one under "model"')
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise UserError(f'{path}: {name!r} is a {type(tensor).__name__}: expected a dictionary of tensors, or one under "model"')
        self._tensors: dict[str, _Tensor] = tensors

    def _read(self, name: str) -> bytes:
        info = self._zip.getinfo(f"{self._prefix}{name}")
        if info.compress_type != zipfile.ZIP_STORED:  # torch.save never compresses: a small file could unpack to anything
            raise ValueError(f"{name} in it is compressed")
        if name == "data.pkl" and info.file_size > _LARGEST_PICKLE:
            raise ValueError(f"its data.pkl has {info.file_size} bytes, and {_LARGEST_PICKLE} are far more than names need")
        return self._zip.read(info)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """As it is read: fp32 of what is stored in fp64."""
        return jax.dtypes.canonicalize_dtype(self._tensors[name].storage.dtype)

    def read(self, name: str, into: np.ndarray, first: int = 0) -> np.ndarray:
        """As many of a tensor's numbers from the `first` on as `into` holds, in that memory."""
        into[...] = np.asarray(self.get_tensor(name)).reshape(-1)[first : first + into.size].reshape(into.shape)
        return into

    def get_tensor(self, name: str) -> jax.Array:
        storage, offset, shape, strides = self._tensors[name]
        try:
            data = np.frombuffer(self._read(f"data/{storage.key}"), storage.dtype)
        except _DAMAGED as error:
            raise UserError(f"{self.path}: the data of tensor {name!r} cannot be read ({error}): download it again") from None
        # Strides come from the file: a view beyond the data would read whatever lies in memory there, and one that repeats it (stride
        # 0) could be larger than any memory.
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min(offset, *shape, *strides, 0) < 0 or (0 not in shape and max(last + 1, math.prod(shape)) > data.size):
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
