"""The Flax port: Mixtral, its numerics and its adapters. Imports jax, flax and numpy, never moejax.

Importing this package imports no jax: `models.config` describes an architecture without it, and the rest is loaded when first used.
"""

from typing import TYPE_CHECKING, Any

from models.config import PRESETS, LoRAConfig, MixtralConfig, Quantization, from_hub_config

if TYPE_CHECKING:
    from models.build import build
    from models.mixtral import Mixtral

__all__ = ["PRESETS", "LoRAConfig", "Mixtral", "MixtralConfig", "Quantization", "build", "from_hub_config"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from models.build import build

        return build
    if name == "Mixtral":
        from models.mixtral import Mixtral

        return Mixtral
    raise AttributeError(f"module 'models' has no attribute {name!r}")
