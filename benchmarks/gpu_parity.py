"""Are the numbers right on this device? The vectors of tests/vectors, without pytest: NF4 against bitsandbytes to the bit, Mixtral and
BlackMamba (logits, loss, every gradient, expert counts) and LoRA against PyTorch in fp32. JSON out, with the largest difference of each.

    python benchmarks/gpu_parity.py --out benchmarks/results/<date>-gpu-parity.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # a GPU's fp32 products are in tf32 otherwise
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax
import jax.numpy as jnp
import kept
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from support import VECTORS, hub_tensor, loss_and_gradients

from moejax.data.batch import Batch
from moejax.hub.names import modules, tensors
from moejax.hub.peft import load_adapter
from moejax.hub.weights import attribute, load_weights
from moejax.models.build import build
from moejax.models.config import BlackMambaConfig, LoRAConfig, from_hub_config
from moejax.models.ops import quantized
from moejax.training.state import split
from moejax.training.step import Objective, sums

LOGITS, GRADIENTS, LOSS = 5e-5, 2e-5, 1e-5  # the suite's bars on a CPU: absolute, of a tensor's largest, relative
Check = dict[str, Any]


def check(name: str, difference: float, bar: float) -> Check:
    return {"check": name, "difference": float(difference), "bar": bar, "ok": bool(difference <= bar)}


def vectors(name: str) -> dict[str, np.ndarray]:
    with np.load(VECTORS / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def nf4_codes() -> Iterator[Check]:
    """How many codes, scales and dequantized weights differ in a bit."""
    known = vectors("nf4")
    for case in sorted({key.split("/")[0] for key in known if key.endswith("/weight")}):
        weight = jnp.asarray(known[f"{case}/weight"], str(known[f"{case}/dtype"]))
        for kind in ("single", "double"):
            ours, key = quantized.encode("nf4-double" if kind == "double" else "nf4", weight), f"{case}/{kind}"
            parts = dict(ours.parts)
            for dtype in ("float32", "bfloat16"):
                parts[dtype] = np.asarray(jax.jit(quantized.dequantized, static_argnums=1)(ours.tensor(), jnp.dtype(dtype)), np.float32)
            different = sum(int(np.sum(np.asarray(value) != known[f"{key}/{name}"])) for name, value in parts.items())
            yield check(f"nf4 {key}: bits", different, 0)


def batch_of(known: dict[str, np.ndarray]) -> Batch:
    """The right-padded, prompt-masked batch of a vectors' file in our form."""
    ids, mask, labels = (known[name] for name in ("ids", "mask", "labels"))
    targets, loss_mask = np.zeros_like(ids), np.zeros(ids.shape, np.float32)
    targets[:, :-1], loss_mask[:, :-1] = ids[:, 1:], labels[:, 1:] != -100
    arrays = (ids, targets, loss_mask, mask, np.arange(ids.shape[1])[None] * mask)
    return Batch(*(jnp.asarray(a, jnp.float32 if a is loss_mask else jnp.int32) for a in arrays))


def hub_folder(known: dict[str, np.ndarray], config: dict[str, Any], folder: Path) -> Path:
    """The vectors' weights as a model in Hub layout."""
    folder.mkdir()
    weights = {name[2:]: np.ascontiguousarray(value) for name, value in known.items() if name.startswith("w/")}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def of_largest(ours: Any, reference: np.ndarray) -> float:
    """The largest difference, of the reference's largest magnitude."""
    return float(np.abs(np.asarray(ours) - reference).max() / max(np.abs(reference).max(), 1e-12))


def compared(name: str, model: Any, batch: Batch, known: dict[str, np.ndarray], key: str, gradient: Any) -> Iterator[Check]:
    """gradient(name, model of gradients) -> array, for each `{key}/grad/…` of the vectors."""
    real = np.asarray(batch.segment_ids) > 0
    logits = model.logits(model(batch.tokens, batch.segment_ids, batch.positions)[0])
    yield check(f"{name}: logits", np.abs(np.asarray(logits)[real] - known[f"{key}/logits"][real]).max(), LOGITS)
    loss, stats, gradients = loss_and_gradients(model, batch, remat="full")
    yield check(f"{name}: loss", abs(float(loss) / float(known[f"{key}/loss"]) - 1), LOSS)
    yield check(f"{name}: tokens at another expert", int(np.sum(np.asarray(stats.counts) != known[f"{key}/counts"])), 0)
    ours = dict(gradient(gradients))
    yield check(f"{name}: gradients", max(of_largest(v, known[f"{key}/grad/{n}"]) for n, v in ours.items()), GRADIENTS)


def mixtral(folder: Path) -> Iterator[Check]:
    known = vectors("mixtral")
    where = hub_folder(known, json.loads(str(known["config"])) | {"model_type": "mixtral"}, folder / "mixtral")
    sizes = from_hub_config(json.loads((where / "config.json").read_text()))
    batch = batch_of(known)
    for case, k in {"top2": 2, "dense": 8}.items():
        model = load_weights(build(sizes.replace(experts_per_token=k), dtype=jnp.float32), where, jax.random.key(0))

        def gradients(tree: Any) -> Iterator[tuple[str, Any]]:
            return ((f"{name}.weight", hub_tensor(tree, place)) for name, place in modules(sizes).items())

        yield from compared(f"mixtral {case}", model, batch, known, case, gradients)
    for case in ("experts", "all"):
        yield from lora(case, sizes, where, batch)


def lora(case: str, sizes: Any, where: Path, batch: Batch) -> Iterator[Check]:
    known = vectors(f"lora_{case}")
    settings = json.loads(str(known["settings"]))
    adapter = LoRAConfig(settings["r"], settings["lora_alpha"], 0.0, tuple(settings["targets"]))
    model = load_weights(build(sizes, adapter=adapter, dtype=jnp.float32), where, jax.random.key(0))
    load_adapter(model, VECTORS / f"peft_{case}")
    graphdef, trainable, frozen = split(model, full=False)
    objective = Objective(graphdef, full=False, remat="full")
    loss, gradients = jax.jit(jax.value_and_grad(lambda t: sums(objective, t, frozen, batch, None)[0] / batch.loss_mask.sum()))(trainable)
    yield check(f"lora {case}: loss", abs(float(loss) / float(known["losses"][0]) - 1), LOSS)
    of_model, worst = nnx.merge(graphdef, gradients, frozen), 0.0
    for name, place in modules(sizes).items():
        pair = getattr(reduce(getattr, place.path, of_model), "lora", None)
        if pair is not None:
            index = (place.layer,) if place.expert is None else (place.layer, place.expert)
            for letter, variable in (("A", pair.a), ("B", pair.b)):
                reference = known[f"grad/base_model.model.{name}.lora_{letter}.weight"]
                worst = max(worst, of_largest(variable.get_value()[index], reference))
    yield check(f"lora {case}: gradients", worst, GRADIENTS)


def blackmamba(folder: Path) -> Iterator[Check]:
    known = vectors("blackmamba")
    stored = json.loads(str(known["config"]))
    stored.pop("dt_rank")
    where = hub_folder(known, BlackMambaConfig(**stored).to_hub_config(), folder / "blackmamba")
    sizes = from_hub_config(json.loads((where / "config.json").read_text()))
    batch = batch_of(known)

    def gradients(tree: Any) -> Iterator[tuple[str, Any]]:
        for name, places in tensors(sizes).items():
            found = (getattr(attribute(tree, p.path), p.attr).get_value() for p in places)
            indices = (tuple(i for i in (p.layer, p.expert) if i is not None) or ... for p in places)
            array = np.concatenate([np.asarray(value[index]) for value, index in zip(found, indices, strict=True)])
            yield name, array[:, None] if name.endswith("conv1d.weight") else array

    for case, k in {"top2": 2, "dense": 4}.items():
        model = load_weights(build(sizes.replace(experts_per_token=k), dtype=jnp.float32), where, jax.random.key(0))
        yield from compared(f"blackmamba {case}", model, batch, known, case, gradients)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = kept.about(device=jax.local_devices()[0].device_kind, checks=[])
    with tempfile.TemporaryDirectory() as folder:
        for checks in (nf4_codes(), mixtral(Path(folder)), blackmamba(Path(folder))):
            for made in checks:
                report["checks"].append(made)
                kept.write(options.out, report)
                print(json.dumps(made), flush=True)
    return int(not all(c["ok"] for c in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
