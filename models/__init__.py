"""The Flax port: the models, their numerics and their adapters. Imports jax, flax and numpy, and nothing else of moejax.

The folder lies at the top of the checkout, and moejax/models is a link to it: `moejax.models` is its one name.

Importing this package imports no jax: `moejax.models.config` describes an architecture without it, and the rest is loaded when first used.

Shapes are written with one alphabet: B batch, T tokens in a row, N = B·T, D model, F expert hidden, E experts, K experts per token, H query
heads, G key-value heads, C head dim, S state, V vocabulary, R LoRA rank, L layers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moejax.models.config import (
    FAMILIES,
    PRESETS,
    Architecture,
    BlackMambaConfig,
    LoRAConfig,
    MixtralConfig,
    OlmoeConfig,
    Quantization,
    Qwen3MoeConfig,
    from_hub_config,
    register,
)

if __name__ == "models":
    raise ImportError("the folder models/ of a checkout: import it as moejax.models, or every class would be there twice")

if TYPE_CHECKING:
    from moejax.models.build import build
    from moejax.models.decoder import Decoder

__all__ = [
    "FAMILIES", "PRESETS", "Architecture", "BlackMambaConfig", "Decoder", "LoRAConfig", "MixtralConfig", "OlmoeConfig", "Quantization",
    "Qwen3MoeConfig", "build", "from_hub_config", "register",
]  # fmt: skip

_WITH_JAX = {"build": "build", "Decoder": "decoder"}


def __getattr__(name: str) -> Any:
    if name not in _WITH_JAX:
        raise AttributeError(f"module 'moejax.models' has no attribute {name!r}")
    return getattr(import_module(f"moejax.models.{_WITH_JAX[name]}"), name)
