"""Scopes in a PyTorch program, named as moejax/profiling/scopes.py names them: `record_function` with a mark of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

MARK = "moejax:"
_on = False


def switch(on: bool) -> None:
    """Scopes cost nothing until they are switched on, for traced steps."""
    global _on  # noqa: PLW0603
    _on = on


def scope(name: str) -> AbstractContextManager[Any]:
    return torch.profiler.record_function(MARK + name) if _on else nullcontext()


def wrap(module: torch.nn.Module, name: str) -> None:
    """Run a module's forward pass under a scope."""
    inner: Callable[..., Any] = module.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        with scope(name):
            return inner(*arguments, **named)

    module.forward = forward  # type: ignore[method-assign]


_LAST = {
    "embed_tokens": "embed", "norm": "norm", "self_attn": "attention", "q_norm": "attention/norm", "k_norm": "attention/norm",
    "act_fn": "moe/act",
}  # fmt: skip


def name_scopes(model: torch.nn.Module, moe: str, names: Mapping[str, str]) -> None:
    """Put every module of a transformers model of attention and experts, with PEFT's adapters or without, under its scope.

    moe: what it calls the experts' half of a layer; names: our name of a linear layer -> its own.
    """
    ours = {name: target for target, name in names.items()}
    for path, module in model.named_modules():
        parts = path.split(".")
        inside = "moe" if moe in parts else "attention"
        own = [p for p in parts if p not in ("base_layer", "default")]
        last = own[-1]
        target = ours.get(last)
        if not path or "lora_A" in parts or "lora_B" in parts:
            continue
        if hasattr(module, "lora_A") and parts[-1] != "base_layer" and hasattr(module, "base_layer"):
            wrap(module, f"{inside}/lora")  # what is not the base layer's
        elif target is not None:
            wrap(module, "attention" if inside == "attention" else "moe/router" if target == "gate" else f"moe/{target}")
        elif last.isdigit() and "experts" in own:
            wrap(module, "moe/act")
        elif last.isdigit() and own[-2] == "layers":
            wrap(module, "layers")
        elif last == moe or (last == "experts" and not isinstance(module, torch.nn.ModuleList)):
            wrap(module, "moe")
        elif last in _LAST:
            wrap(module, _LAST[last])
        elif last.endswith("layernorm"):  # before a half or behind it: input_, post_attention_, post_feedforward_
            wrap(module, "norm")
