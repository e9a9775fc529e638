"""moejax: fine-tune Mixture-of-Experts models on one GPU or several, in JAX. In Python (docs/api.md):

    import moejax

    lm = moejax.load("runs/demo")
    print(lm.chat("What is 2 + 3?"))

Importing this imports no jax: what is named here is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejax.api import Batch, LanguageModel, MemoryEstimate, Run, estimate_memory, load, loss, loss_and_grads, train

__version__ = "0.1.0"

__all__ = ["Batch", "LanguageModel", "MemoryEstimate", "Run", "estimate_memory", "load", "loss", "loss_and_grads", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moejax' has no attribute {name!r}: it has {', '.join(__all__)}")
    return getattr(import_module("moejax.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
