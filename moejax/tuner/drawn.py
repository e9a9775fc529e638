"""Operands, drawn by numpy: a child process compiles nothing but what it measures."""

from __future__ import annotations

from typing import Any

import numpy as np


class Drawn:
    """The same numbers for the same seed, anyone who asks."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: Any = "float32", scale: float = 1.0) -> Any:
        """On the device."""
        import jax.numpy as jnp

        return jnp.asarray((scale * self._rng.standard_normal(shape, np.float32)).astype(jnp.dtype(dtype)))

    def weight(self, storage: str, *shape: int, dtype: Any = "float32") -> Any:
        """[..., out, in] as an array, or random codes under scales as an initialized model has them."""
        if storage == "array":
            return self.normal(*shape, dtype=dtype, scale=0.02)
        import jax.numpy as jnp

        from moejax.models.ops import quantized

        def fill(name: str, part: Any) -> Any:
            if part.dtype == jnp.uint8 and name != "scales":
                return jnp.asarray(self._rng.integers(0, 256, part.shape, np.uint8))
            return jnp.asarray(np.full(part.shape, {"nested_absmax": 0.005, "scales": 120}.get(name, 0.035), part.dtype))

        empty = quantized.abstract(storage, shape)
        return empty.with_parts({name: fill(name, part) for name, part in empty.parts().items()})
