"""Scopes in a PyTorch program, named as moejax/profiling/scopes.py names them: `record_function` with a mark of ours."""

from __future__ import annotations

from collections.abc import Callable
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
    "embed_tokens": "embed", "input_layernorm": "norm", "post_attention_layernorm": "norm", "norm": "norm", "self_attn": "attention",
    "block_sparse_moe": "moe", "mlp": "moe", "act_fn": "moe/act",
}  # fmt: skip
_MOE = ("gate", "w1", "w2", "w3")


def name_scopes(model: torch.nn.Module) -> None:
    """Put every module of a transformers Mixtral, with PEFT's adapters or without, under its scope."""
    for path, module in model.named_modules():
        parts = path.split(".")
        adapter = next((p for p in parts if p in ("lora_A", "lora_B")), None)
        inside = "moe" if any(p in ("block_sparse_moe", "mlp") for p in parts) else "attention"
        own = [p for p in parts if p not in ("base_layer", "default")]
        last = own[-1] if own else ""
        if adapter is not None or not path:
            continue
        if hasattr(module, "lora_A") and parts[-1] != "base_layer" and hasattr(module, "base_layer"):
            wrap(module, f"{inside}/lora")  # what is not the base layer's
        elif last in _MOE and inside == "moe":
            wrap(module, "moe/router" if last == "gate" else f"moe/{last}")
        elif last in ("q_proj", "k_proj", "v_proj", "o_proj"):
            wrap(module, "attention")
        elif last.isdigit() and "experts" in own:
            wrap(module, "moe/act")
        elif last.isdigit() and own[-2] == "layers":
            wrap(module, "layers")
        elif last == "experts" and not isinstance(module, torch.nn.ModuleList):
            wrap(module, "moe")
        elif last in _LAST:
            wrap(module, _LAST[last])
