"""Are the numbers right on this device? The vectors of tests/vectors, without pytest: NF4 against bitsandbytes, MXFP4 against transformers
to the bit, Mixtral and BlackMamba (logits, loss, every gradient, expert counts) and LoRA against PyTorch in fp32. JSON out, with the
largest difference of each.

    python benchmarks/gpu_parity.py --out benchmarks/results/<date>-gpu-parity.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # a GPU's fp32 products are in tf32 otherwise
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax
import jax.numpy as jnp
import kept
import numpy as np
from support import VECTORS, adapter_tensors, batch_of, hub_arrays, hub_folder, loss_and_gradients, read_vectors

from moejax.hub.peft import load_adapter
from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build
from moejax.models.config import LoRAConfig
from moejax.models.ops import quantized

LOGITS, GRADIENTS, LOSS = 5e-5, 2e-5, 1e-5  # the suite's bars on a CPU: absolute, of a tensor's largest, relative
Check = dict[str, Any]


def check(name: str, difference: float, bar: float) -> Check:
    return {"check": name, "difference": float(difference), "bar": bar, "ok": bool(difference <= bar)}


def nf4_codes() -> Iterator[Check]:
    """How many codes, scales and dequantized weights differ in a bit."""
    known = read_vectors("nf4")
    for case in sorted({key.split("/")[0] for key in known if key.endswith("/weight")}):
        weight = jnp.asarray(known[f"{case}/weight"], str(known[f"{case}/dtype"]))
        for kind in ("single", "double"):
            ours, key = quantized.encode("nf4-double" if kind == "double" else "nf4", weight), f"{case}/{kind}"
            parts = dict(ours.parts)
            for dtype in ("float32", "bfloat16"):
                parts[dtype] = np.asarray(jax.jit(quantized.dequantized, static_argnums=1)(ours.tensor(), jnp.dtype(dtype)), np.float32)
            different = sum(int(np.sum(np.asarray(value) != known[f"{key}/{name}"])) for name, value in parts.items())
            yield check(f"nf4 {key}: bits", different, 0)


def mxfp4_codes() -> Iterator[Check]:
    """How many weights of gpt-oss's blocks and scales differ in a bit from transformers' dequantization."""
    known = read_vectors("mxfp4")
    for case in sorted({key.split("/")[0] for key in known if key.endswith("/blocks")}):
        *leading, rows, blocks, _ = known[f"{case}/blocks"].shape
        parts = {"codes": known[f"{case}/blocks"].reshape(*leading, -1), "scales": known[f"{case}/scales"].reshape(*leading, -1)}
        tensor = quantized.Canonical("mxfp4", (*leading, rows, 32 * blocks), parts).tensor()
        for dtype, bits in (("float32", np.int32), ("bfloat16", np.int16)):
            value = np.asarray(jax.jit(quantized.dequantized, static_argnums=1)(tensor, jnp.dtype(dtype)))
            yield check(f"mxfp4 {case}/{dtype}: bits", int(np.sum(value.view(bits) != known[f"{case}/{dtype}"])), 0)


def of_largest(ours: Any, reference: np.ndarray) -> float:
    """The largest difference, of the reference's largest magnitude."""
    return float(np.abs(np.asarray(ours) - reference).max() / max(np.abs(reference).max(), 1e-12))


def gradients_of(name: str, ours: dict[str, Any], known: dict[str, np.ndarray], prefix: str) -> Check:
    """Of each of the vectors' gradients."""
    theirs = {key.removeprefix(prefix): value for key, value in known.items() if key.startswith(prefix)}
    return check(f"{name}: gradients", max(of_largest(ours[key], value) for key, value in theirs.items()), GRADIENTS)


def whole(family: str, cases: dict[str, int], folder: Path) -> Iterator[Check]:
    """A family's model, all of it trained, with this many experts a token in each case."""
    known = read_vectors(family)
    batch, sizes = batch_of(known), read_config(hub_folder(known, folder))
    real = np.asarray(batch.segment_ids) > 0
    for case, k in cases.items():
        model = load_weights(build(sizes.replace(experts_per_token=k), dtype=jnp.float32), folder, jax.random.key(0))
        name = f"{family} {case}"
        logits = model.logits(model(batch.tokens, batch.segment_ids, batch.positions)[0])
        yield check(f"{name}: logits", np.abs(np.asarray(logits)[real] - known[f"{case}/logits"][real]).max(), LOGITS)
        loss, stats, gradients = loss_and_gradients(model, batch, remat="full")
        yield check(f"{name}: loss", abs(float(loss) / float(known[f"{case}/loss"]) - 1), LOSS)
        yield check(f"{name}: tokens at another expert", int(np.sum(np.asarray(stats.counts) != known[f"{case}/counts"])), 0)
        yield gradients_of(name, dict(hub_arrays(gradients)), known, f"{case}/grad/")


def lora(case: str, folder: Path) -> Iterator[Check]:
    """Adapters on the Mixtral in `folder`."""
    known, batch = read_vectors(f"lora_{case}"), batch_of(read_vectors("mixtral"))
    settings = json.loads(str(known["settings"]))
    adapter = LoRAConfig(settings["r"], settings["lora_alpha"], 0.0, tuple(settings["targets"]))
    model = load_weights(build(read_config(folder), adapter=adapter, dtype=jnp.float32), folder, jax.random.key(0))
    load_adapter(model, VECTORS / f"peft_{case}")
    loss, _, gradients = loss_and_gradients(model, batch, full=False, remat="full")
    yield check(f"lora {case}: loss", abs(float(loss) / float(known["losses"][0]) - 1), LOSS)
    yield gradients_of(f"lora {case}", adapter_tensors(gradients), known, "grad/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = kept.about(device=jax.local_devices()[0].device_kind, checks=[])
    with tempfile.TemporaryDirectory() as name:
        mixtral, blackmamba = Path(name) / "mixtral", Path(name) / "blackmamba"
        for made in itertools.chain(
            nf4_codes(), mxfp4_codes(), whole("mixtral", {"top2": 2, "dense": 8}, mixtral), lora("experts", mixtral), lora("all", mixtral),
            whole("blackmamba", {"top2": 2, "dense": 4}, blackmamba),
        ):  # fmt: skip
            report["checks"].append(made)
            kept.write(options.out, report)
            print(json.dumps(made), flush=True)
    return int(not all(c["ok"] for c in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
