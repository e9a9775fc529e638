"""BlackMamba in plain PyTorch, from its specification: left to automatic differentiation.

No kernel of anyone's, except the scan of the package mamba_ssm where one asks for it and a GPU has it built. Weights are a dictionary
by the checkpoint's names. `tests/oracles/blackmamba.py` makes the parity vectors with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contract
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tracing import scope

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    hidden_size: int
    num_layers: int
    num_experts: int
    state_size: int
    conv_size: int = 4
    expansion: int = 2

    @property
    def inner(self) -> int:
        return self.expansion * self.hidden_size

    @property
    def rank(self) -> int:
        return -(-self.hidden_size // 16)


def sizes_of(config: dict[str, Any]) -> Sizes:
    """From a checkpoint's config.json."""
    experts = int(str(config["mamba_moe_layers"][1]))
    return Sizes(
        config["hidden_size"],
        config["num_layers"],
        experts,
        config["state_size"],
        config["conv_dimension"],
        config["expansion_factor"],
    )


def load(folder: Path, dtype: torch.dtype) -> tuple[Weights, dict[str, Any]]:
    """Weights (trainable) and config of a folder in Hub layout."""
    from safetensors.torch import load_file

    weights = {name: w.to(dtype).requires_grad_() for name, w in load_file(folder / "model.safetensors").items()}
    return weights, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def random(shapes: dict[str, list[int]], dtype: torch.dtype, device: str) -> Weights:
    """Random weights of these shapes, by the checkpoint's names, made on the device: for hardware studies, where only sizes matter."""
    weights = {name: torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02) for name, shape in shapes.items()}
    for name, w in weights.items():
        if "norm" in name and name.endswith("weight"):
            w.fill_(1.0)
    return weights


def kernel_version(device: str) -> str:
    """Of mamba_ssm, whose scan is a CUDA kernel. Raises contract.CannotRun where it cannot run."""
    try:
        import mamba_ssm
    except ImportError:
        raise contract.CannotRun(
            "--scan mamba_ssm: the package mamba_ssm is not installed (it has to be built for the GPU)"
        ) from None
    if device != "cuda":
        raise contract.CannotRun(f"--scan mamba_ssm: its kernel runs on a CUDA device, not on {device}")
    return str(mamba_ssm.__version__)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with scope("norm"):
        wide = x.float()
        normal = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
        return weight.to(x.dtype) * normal.to(x.dtype)


def mamba(
    x: torch.Tensor, w: Weights, name: str, c: Sizes, segments: torch.Tensor | None = None, kernel: bool = False
) -> torch.Tensor:
    """x: [B, T, H]; segments: int [B, T], nothing passes from one to the next (None: a row is one). kernel: mamba_ssm's scan."""
    dtype = x.dtype

    def weight(key: str) -> torch.Tensor:
        return w[f"{name}.{key}"].to(dtype)

    with scope("mamba"):
        inner, z = (x @ weight("in_proj.weight").T).split(c.inner, dim=-1)
        with scope("mamba/conv"):
            u = F.silu(_convolution(inner, weight("conv1d.weight"), weight("conv1d.bias"), segments))
        low, b, read = (u @ weight("x_proj.weight").T).split([c.rank, c.state_size, c.state_size], dim=-1)
        dt = F.softplus((low @ weight("dt_proj.weight").T).float() + w[f"{name}.dt_proj.bias"].float())
        with scope("mamba/scan"):
            a, d = -torch.exp(w[f"{name}.A_log"].float()), w[f"{name}.D"].float()
            run = kernel_scan if kernel else scan
            y = run(u.float(), dt, a, b.float(), read.float(), d, segments)
        return (y * F.silu(z.float())).to(dtype) @ weight("out_proj.weight").T


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Causal and depthwise; a tap that would reach another segment is zero. weight: [D, 1, K]."""
    t, size = x.shape[1], weight.shape[-1]
    y = bias + weight[:, 0, size - 1] * x
    for back in range(1, size):
        tap = F.pad(x, (0, 0, back, 0))[:, :t]
        if segments is not None:
            tap = tap * (F.pad(segments, (back, 0), value=-1)[:, :t] == segments)[..., None].to(x.dtype)
        y = y + weight[:, 0, size - 1 - back] * tap
    return y


def scan(u, dt, a, b, read, d, segments=None):  # type: ignore[no-untyped-def]
    """u, dt: [B, T, D]; a: [D, N]; b, read: [B, T, N]; d: [D]. A loop over time; the state is zero where a segment begins."""
    decay = torch.exp(dt[..., None] * a)
    if segments is not None:
        decay = decay * (F.pad(segments, (1, 0), value=-1)[:, :-1] == segments)[..., None, None].to(decay.dtype)
    h, states = torch.zeros(u.shape[0], *a.shape, device=u.device), []
    for kept, new in zip(decay.unbind(1), ((dt * u)[..., None] * b[:, :, None]).unbind(1), strict=True):
        h = torch.addcmul(new, kept, h)
        states.append(h)
    return torch.einsum("btdn,btn->btd", torch.stack(states, dim=1), read) + d * u


def kernel_scan(u, dt, a, b, read, d, segments=None):  # type: ignore[no-untyped-def]
    """The same by mamba_ssm's CUDA kernel; a row is one segment, and padding stands behind it. Its channels come before time."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous()

    return selective_scan_fn(turned(u), turned(dt), a, turned(b), turned(read), d.float()).transpose(1, 2)


def moe(
    x: torch.Tensor, w: Weights, name: str, k: int, activation: str, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: [..., H] -> the output, choices [..., K] and probabilities [..., E]. A loop over experts, each for its own tokens."""
    act = {"gelu": F.gelu, "silu": F.silu}[activation]
    rows = x.reshape(-1, x.shape[-1])
    with scope("moe"):
        with scope("moe/router"):
            p = torch.sigmoid(rows.float() @ w[f"{name}.router.weight"].float().T + w[f"{name}.router.bias"].float())
        with scope("moe/topk"):
            weights, chosen = p.topk(k, dim=-1)
        out = torch.zeros_like(rows)
        for e in range(experts):
            with scope("moe/dispatch"):
                token, slot = (chosen == e).nonzero(as_tuple=True)
                mine, share = rows[token], weights[token, slot].to(x.dtype)
            with scope("moe/w1"):
                a, g = (mine @ w[f"{name}.local_experts.{e}.linear_fc1.weight"].to(x.dtype).T).chunk(2, dim=-1)
            with scope("moe/act"):
                gated = act(a) * g
            with scope("moe/w2"):
                y = gated @ w[f"{name}.local_experts.{e}.linear_fc2.weight"].to(x.dtype).T
            with scope("moe/combine"):
                out = out.index_add(0, token, y * share[:, None])
    return out.reshape(x.shape), chosen.reshape(*x.shape[:-1], k), p.detach().reshape(*x.shape[:-1], experts)


def hidden_states(
    w: Weights, ids: torch.Tensor, c: Sizes, k: int, activation: str, *, segments: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32, remat: bool = False, kernel: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """ids: [B, T] -> what the tied head multiplies [B, T, H], and of every MoE layer choices and probabilities. The stream is fp32."""

    def pair(x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with scope("layers"):
            first, second = f"decoder.layers.{layer}", f"decoder.layers.{layer + 1}"
            x = x + mamba(rms_norm(x.to(dtype), w[f"{first}.norm.weight"]), w, f"{first}.mixer", c, segments, kernel)
            n = rms_norm(x.to(dtype), w[f"{second}.norm.weight"])
            out, chosen, p = moe(n, w, f"{second}.mixer", k, activation, c.num_experts)
            return x + out, chosen, p

    with scope("embed"):
        x = w["embedding.word_embeddings.weight"][ids].to(dtype).float()
    choices, probabilities = [], []
    for layer in range(0, c.num_layers, 2):
        x, chosen, p = checkpoint(pair, x, layer, use_reentrant=False) if remat else pair(x, layer)
        choices.append(chosen)
        probabilities.append(p)
    with scope("norm"):
        weight, bias = (w[f"decoder.final_layernorm.{part}"].float() for part in ("weight", "bias"))
        x = F.layer_norm(x.to(dtype).float(), (c.hidden_size,), weight, bias, eps=1e-5).to(dtype)
    return x, choices, probabilities
