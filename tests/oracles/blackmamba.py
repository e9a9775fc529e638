"""What a BlackMamba computes, in plain PyTorch written from its specification: tests/vectors/blackmamba.npz.

    python tests/oracles/blackmamba.py

The model is benchmarks/pytorch/blackmamba.py: a loop over time and a loop over experts, left to automatic differentiation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks" / "pytorch"))
import blackmamba

OUT = Path(__file__).parent.parent / "vectors" / "blackmamba.npz"
SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_layers": 4, "num_experts": 4, "state_size": 4, "conv_size": 4,
    "expansion": 2,
}  # fmt: skip
CASES = {"top1": (1, "gelu"), "top2": (2, "gelu"), "dense": (4, "gelu"), "top2_silu": (2, "silu")}
H, INNER, E, N = SIZES["hidden_size"], 2 * SIZES["hidden_size"], SIZES["num_experts"], SIZES["state_size"]
RANK = -(-H // 16)


def make_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 0.2, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    weights = {"embedding.word_embeddings.weight": normal(SIZES["vocab_size"], H, std=0.5)}
    for layer in range(SIZES["num_layers"]):
        name = f"decoder.layers.{layer}"
        weights[f"{name}.norm.weight"] = normal(H, mean=1.0)
        if layer % 2 == 0:
            weights |= {
                f"{name}.mixer.A_log": normal(INNER, N, std=0.5),
                f"{name}.mixer.D": normal(INNER, mean=1.0),
                f"{name}.mixer.in_proj.weight": normal(2 * INNER, H),
                f"{name}.mixer.conv1d.weight": normal(INNER, 1, 4, std=0.4),
                f"{name}.mixer.conv1d.bias": normal(INNER),
                f"{name}.mixer.x_proj.weight": normal(RANK + 2 * N, INNER),
                f"{name}.mixer.dt_proj.weight": normal(INNER, RANK, std=0.5),
                f"{name}.mixer.dt_proj.bias": normal(INNER, std=0.5, mean=-2.0),
                f"{name}.mixer.out_proj.weight": normal(H, INNER),
            }
        else:
            weights |= {f"{name}.mixer.router.weight": normal(E, H, std=0.4), f"{name}.mixer.router.bias": normal(E, std=0.4)}
            for e in range(E):
                weights[f"{name}.mixer.local_experts.{e}.linear_fc1.weight"] = normal(2 * SIZES["intermediate_size"], H)
                weights[f"{name}.mixer.local_experts.{e}.linear_fc2.weight"] = normal(H, SIZES["intermediate_size"])
    weights["decoder.final_layernorm.weight"] = normal(H, mean=1.0)
    weights["decoder.final_layernorm.bias"] = normal(H)
    return {name: w.requires_grad_() for name, w in weights.items()}


def forward(w: dict[str, torch.Tensor], ids: torch.Tensor, k: int, activation: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    hidden, choices, _ = blackmamba.hidden_states(w, ids, blackmamba.Sizes(H, SIZES["num_layers"], E, N), k, activation)
    return hidden @ w["embedding.word_embeddings.weight"].T, choices


def write_torch_file() -> None:
    """Tensors of several kinds as torch.save writes them: a view with strides, shared storage, a parameter, bf16; and one bad file."""
    numbers = torch.arange(24, dtype=torch.float32)
    tensors = {
        "plain": numbers.reshape(4, 6), "transposed": numbers.reshape(4, 6).T, "shared": numbers[6:18].reshape(3, 4),
        "bf16": numbers.to(torch.bfloat16), "parameter": torch.nn.Parameter(numbers[:2]), "ids": torch.arange(3),
    }  # fmt: skip
    torch.save({"model": tensors}, OUT.parent / "tensors.bin")
    torch.save({"model": tensors, "made": Path("somewhere")}, OUT.parent / "not_only_tensors.bin")


def main() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    lengths = (17, 11, 6)
    ids, mask = rng.integers(0, SIZES["vocab_size"], (3, 17)), np.zeros((3, 17), np.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    labels = np.where((mask == 1) & (np.arange(17) >= 3), ids, -100)
    vectors = {"ids": ids, "mask": mask, "labels": labels, "config": np.array(json.dumps(SIZES | {"dt_rank": RANK}))}
    w = make_weights()
    vectors |= {f"w/{name}": value.detach().numpy() for name, value in w.items()}
    for case, (k, activation) in CASES.items():
        for value in w.values():
            value.grad = None
        logits, choices = forward(w, torch.tensor(ids), k, activation)
        targets = torch.tensor(labels)[:, 1:].reshape(-1)
        flat = logits[:, :-1].reshape(-1, SIZES["vocab_size"])
        loss = F.cross_entropy(flat, targets, ignore_index=-100)
        smooth = F.cross_entropy(flat, targets, ignore_index=-100, label_smoothing=0.1)
        loss.backward()
        real = torch.tensor(mask).bool()
        counts = [torch.bincount(c[real].reshape(-1), minlength=E).numpy() for c in choices]
        vectors |= {f"{case}/logits": logits.detach().numpy(), f"{case}/loss": loss.item(), f"{case}/smooth": smooth.item()}
        vectors[f"{case}/counts"] = np.stack(counts)
        vectors |= {f"{case}/grad/{n}": (torch.zeros_like(v) if v.grad is None else v.grad).numpy() for n, v in w.items()}
    vectors["versions"] = np.array(json.dumps({"torch": torch.__version__}))
    np.savez_compressed(OUT, **vectors)
    write_torch_file()
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
