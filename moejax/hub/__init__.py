"""Checkpoints in and out: Hub safetensors, PEFT adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.models.build import Model

__all__ = ["load"]


def load(source: str, config: Experiment) -> Model:
    """The model of a local folder or a Hub id, as the config stores, computes and adapts it: see `moejax.hub.model.load`."""
    from moejax.hub import model  # parts of this package are imported without jax

    return model.load(source, config)
