"""Tensors out of a PyTorch checkpoint (`torch.save`, zip format) without PyTorch, and without running what a pickle may ask for."""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.errors import UserError

_STORAGES: dict[str, Any] = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class _Storage(NamedTuple):
    key: str
    dtype: Any


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Knows tensors and dictionaries; whatever else a pickle names is refused, never imported."""

    _known: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, and only tensors are read")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return _Storage(str(key), dtype)


class TorchFile:
    """The tensors of a file, read one at a time. A dictionary of them, or one under "model". Raises UserError."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
            pickled = next(name for name in self._zip.namelist() if name.endswith("/data.pkl"))
            with self._zip.open(pickled) as file:
                content = _Unpickler(file).load()
        except (zipfile.BadZipFile, StopIteration, pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is no whole PyTorch checkpoint ({error or 'no data.pkl in it'}): expected a zip of tensors as torch.save writes it"
            ) from None
        self._prefix = pickled.removesuffix("data.pkl")
        tensors = content.get("model", content) if isinstance(content, dict) else None
        if not isinstance(tensors, dict) or not all(isinstance(t, _Tensor) for t in tensors.values()):
            raise UserError(f'{path}: expected a dictionary of tensors, or one under "model"')
        self._tensors: dict[str, _Tensor] = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> jax.Array:
        storage, offset, shape, strides = self._tensors[name]
        try:
            data = np.frombuffer(self._zip.read(f"{self._prefix}data/{storage.key}"), storage.dtype)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{self._path}: the data of tensor {name!r} cannot be read ({error}): download it again") from None
        # Strides come from the file: a view beyond the data would read whatever lies in memory there.
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min(offset, *shape, *strides, 0) < 0 or (0 not in shape and last >= data.size):
            raise UserError(
                f"{self._path}: tensor {name!r} (shape {list(shape)}, strides {list(strides)}, offset {offset}) reaches beyond its "
                f"{data.size} stored elements: a damaged file; download it again"
            )
        data, steps = data[offset:], [s * data.itemsize for s in strides]
        return jnp.asarray(np.lib.stride_tricks.as_strided(data, shape, steps, writeable=False))

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
