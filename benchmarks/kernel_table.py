"""Registers, spilled bytes and shared memory of our own kernels on GPUs that are not there, as ptxas says. Nothing runs.

    python benchmarks/kernel_table.py [--gpus A100-80,A40,L4,H100,RTX-5090] [--out FILE]

Each kernel is compiled by XLA for the card, at the sizes of BlackMamba-2.8B and Mixtral-8x7B in bf16, and its PTX by ptxas for the card's
own chip. A kernel that spills ends the command with exit code 1. warps: that fit on a multiprocessor by their registers. A new kernel is a
line in `KERNELS`.

Needs the extra: pip install -e '.[aot]'; JAX_PLATFORMS=cpu is set here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent))

import kept

from moejax import gpus, installation
from moejax.errors import UserError
from moejax.estimator.targets import MULTIPROCESSORS

GPUS = "A100-80,A40,L4,H100,RTX-5090"
REGISTERS = 65536  # of a multiprocessor
_FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers", re.DOTALL
)  # fmt: skip


def selective_scan() -> tuple[Callable[..., Any], list[Any]]:
    """Forward and backward as in a layer, with softplus and the gate, rows and states of BlackMamba-2.8B."""
    import jax
    import jax.numpy as jnp

    from moejax.models.ops import scan_kernel

    b, t, d, n = 16, 512, 2944, 16
    shapes = [(b, t, d), (b, t, d), (d, n), (b, t, n), (b, t, n), (d,), (b, d, n), (d,), (b, t, 2 * d)]
    fp32 = {2, 5, 6, 7}
    starts = jax.ShapeDtypeStruct((b, t), jnp.bool_)

    def both(starts: Any, *given: Any) -> Any:
        out, pull = jax.vjp(lambda *v: scan_kernel.scan(*v[:6], starts, *v[6:7], gate=v[7:]), *given)
        return out, pull(out)

    return both, [starts, *(jax.ShapeDtypeStruct(s, jnp.float32 if i in fp32 else jnp.bfloat16) for i, s in enumerate(shapes))]


def _mixtral(storage: str, rows: int) -> tuple[Callable[..., Any], list[Any]]:
    """Products by a layer's w1 of Mixtral-8x7B, forward and backward, and the sum over the rows."""
    import jax
    import jax.numpy as jnp

    from moejax.models.ops import quantized
    from moejax.models.ops.grouped import decode, kernels
    from moejax.models.ops.linear import OfLayer

    layers, experts, out, inner = 2, 8, 14336, 4096

    def all_three(weight: Any, layer: Any, sizes: Any, x: Any, dy: Any) -> Any:
        tiles = kernels.Tiles.of(sizes, rows, x.dtype, kernels.MOST_ROWS if storage else kernels.LARGE)
        products, w = decode.Products(tiles), decode.stack(OfLayer(weight, layer), x.dtype)
        return products.forward(x, w), products.backward(dy, w), products.gradient(dy, x)

    arrays = [((), jnp.int32), ((experts,), jnp.int32), ((rows, inner), jnp.bfloat16), ((rows, out), jnp.bfloat16)]
    shape = layers, experts, out, inner
    weight: Any = quantized.abstract(storage, shape) if storage else jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return all_three, [weight, *(jax.ShapeDtypeStruct(*array) for array in arrays)]


KERNELS = {"scan": selective_scan, "decode": partial(_mixtral, "nf4-double", 256), "grouped": partial(_mixtral, "", 8192)}
"""How the names of its kernels begin -> a program that has them, and its arguments."""


def ptxas() -> Path:
    """The one that XLA takes: the extra's. Raises UserError."""
    found = importlib.util.find_spec("nvidia.cuda_nvcc")
    places = [] if found is None else [Path(p) / "bin" / "ptxas" for p in found.submodule_search_locations or ()]
    if not any(p.is_file() for p in places):
        raise UserError(f"ptxas is not here: expected the extra `aot` ({installation.for_extra('aot')})")
    return next(p for p in places if p.is_file())


def compiled_for(gpu: str, name: str, function: Callable[..., Any], arguments: list[Any]) -> list[dict[str, Any]]:
    """One row for each kernel whose name so begins."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from moejax.compiler_options import lowering_for
    from moejax.training.absent import devices

    place, card = SingleDeviceSharding(devices(gpu, 1)[0]), gpus.find(gpu)
    assert card.compiler is not None  # `devices` refuses such a card
    capability = card.compiler.compute_capability
    chip = f"sm_{capability.replace('.', '')}{'a' if capability in ('9.0', '10.0') else ''}"
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    with tempfile.TemporaryDirectory() as folder:
        with lowering_for(card):
            lowering = jax.jit(function).lower(*given)
        lowering.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        ours = [path for path in sorted(Path(folder).glob("*.ptx")) if f".entry {name}" in path.read_text()]
        rows = [row for path in ours for row in _rows(path, chip, capability)]
    return [{"gpu": gpu, "chip": chip, **row} for row in rows if row["kernel"].startswith(name)]


def _rows(path: Path, chip: str, capability: str) -> list[dict[str, Any]]:
    command = [str(ptxas()), "-v", f"-arch={chip}", "-O3", "-o", str(path.with_suffix(".cubin")), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{command[0]} does not take {path.name} for {chip}: {done.stderr.strip()[:300]}")
    text = path.read_text()
    launched = "".join(found.read_text() for found in path.parent.glob("*thunk_sequence*"))
    dynamic = {name: int(size) for name, size in re.findall(r"\] (\w+) grid: .*shared_memory: (\d+) bytes", launched)}
    shared = sum(int(n) for n in re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", text))
    threads = int((re.search(r"\.(?:reqntid|maxntid) (\d+)", text) or ["", "32"])[1])
    rows = []
    for m in _FUNCTION.finditer(done.stderr):
        registers = int(m["registers"])
        of_warp = -(-registers * 32 // 256) * 256
        warps = min(REGISTERS // of_warp, MULTIPROCESSORS[capability].threads // 32)
        rows.append({
            "kernel": m["name"], "registers": registers, "spilled_bytes": int(m["stores"]) + int(m["loads"]),
            "shared_bytes": shared + dynamic.get(m["name"], 0),
            "threads": threads, "warps": warps,
        })  # fmt: skip
    return rows


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default=GPUS, help=f"comma-separated (default: {GPUS})")
    parser.add_argument("--out", type=Path, help="JSON of the table, with versions")
    options = parser.parse_args()
    report = kept.about(versions=installation.versions(), kernels=[])
    print(f"{'':<10} {'':<7} {'kernel':<20} registers spilled shared threads warps", flush=True)
    for name, make in KERNELS.items():
        for gpu in options.gpus.split(","):
            for row in compiled_for(gpu, name, *make()):
                print(
                    f"{row['gpu']:<10} {row['chip']:<7} {row['kernel']:<20} {row['registers']:>9} {row['spilled_bytes']:>7} "
                    f"{row['shared_bytes']:>6} {row['threads']:>7} {row['warps']:>5}", flush=True
                )  # fmt: skip
                report["kernels"].append(row)
            kept.write(options.out, report)
    return int(any(row["spilled_bytes"] for row in report["kernels"]))


if __name__ == "__main__":
    sys.exit(main())
