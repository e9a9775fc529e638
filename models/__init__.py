"""The Flax port: the models, their numerics and their adapters. Imports jax, flax and numpy, and nothing else of moejax.

The folder lies at the top of the checkout, and moejax/models is a link to it: `moejax.models` is its one name.

Importing this package imports no jax: `moejax.models.config` describes an architecture without it, and the rest is loaded when first used.
"""

from typing import TYPE_CHECKING, Any

from moejax.models.config import PRESETS, LoRAConfig, MixtralConfig, Quantization, from_hub_config

if __name__ == "models":
    raise ImportError("the folder models/ of a checkout: import it as moejax.models, or every class would be there twice")

if TYPE_CHECKING:
    from moejax.models.build import build
    from moejax.models.decoder import Decoder

__all__ = ["PRESETS", "Decoder", "LoRAConfig", "MixtralConfig", "Quantization", "build", "from_hub_config"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from moejax.models.build import build

        return build
    if name == "Decoder":
        from moejax.models.decoder import Decoder

        return Decoder
    raise AttributeError(f"module 'moejax.models' has no attribute {name!r}")
