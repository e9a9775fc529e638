"""Seconds to dequantize one NF4 matrix on this CPU: ours in either layout, and bitsandbytes' own kernel in its environment, in turn.

    python benchmarks/dequantize.py [--shape 14336x4096] [--repeat 9] [--threads 2] [--out FILE]      # needs `make reference4`
    python benchmarks/dequantize.py --step configs/bench_mixtral_tiny.yaml [--repeat 25]   # a whole step in either layout, in turn

Ratios are of medians, ours over bitsandbytes'. Block scales are fp32 on both sides (no double quantization).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import kept
from turns import Side, alternate, summary

ROOT = Path(__file__).parent.parent
DTYPES = ("bfloat16", "float32")
_THEIRS = """
import json, sys, time, torch, bitsandbytes.functional as f
out, inner, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
codes, states = f.quantize_4bit(torch.randn(out, inner), blocksize=64, quant_type="nf4")
print("{}", flush=True)
for line in sys.stdin:
    seconds = {}
    for dtype in ("bfloat16", "float32"):
        states.dtype = getattr(torch, dtype)
        start = time.perf_counter()
        f.dequantize_4bit(codes, states)
        seconds[dtype] = time.perf_counter() - start
    print(json.dumps(seconds), flush=True)
"""


_STEP = """
import runpy, sys
layout, script, sys.argv[1:] = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.path.insert(0, script.rpartition("/")[0])
from moejax.models.ops import quantized
quantized.layout = lambda platform: layout
runpy.run_path(script, run_name="__main__")
"""


def steps(config: str, repeat: int) -> None:
    """Print the seconds of a config's step with random weights in both layouts."""
    script, own = str(ROOT / "benchmarks/step.py"), {"JAX_PLATFORMS": "cpu"}
    arguments = ["--config", config, "--serve", "--random"]
    with (
        Side([sys.executable, "-c", _STEP, "halves", script, *arguments], own) as halves,
        Side([sys.executable, "-c", _STEP, "pairs", script, *arguments], own) as pairs,
    ):
        rounds = alternate({"halves": halves, "pairs": pairs}, repeat)
    medians = {name: summary(of_side)["median"] for name, of_side in rounds.items()}
    print(f"step: halves {medians['halves']:.3f} s, pairs {medians['pairs']:.3f} s, ratio {medians['pairs'] / medians['halves']:.2f}")


def ours(out: int, inner: int) -> None:
    """Answer every line of the input with the seconds of each layout and dtype."""
    import jax

    from moejax.models.ops import nf4, quantized

    one = jax.random.normal(jax.random.key(0), (out, inner))
    canonical = quantized.encode("nf4", one)
    calls = {}
    for layout in quantized.LAYOUTS:
        held = quantized.abstract("nf4", (out, inner), layout)
        tensor = jax.device_put(held.with_parts({name: held.pack(name, part) for name, part in canonical.parts.items()}))
        for dtype in DTYPES:
            compiled = jax.jit(lambda t, dtype=dtype: nf4.dequantize(t, dtype)).lower(tensor).compile()
            calls[f"{layout} {dtype}"] = lambda compiled=compiled, tensor=tensor: compiled(tensor)
    print("{}", flush=True)
    for _ in sys.stdin:
        seconds = {}
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name] = time.perf_counter() - start
        print(json.dumps(seconds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="14336x4096", metavar="OUTxIN")
    parser.add_argument("--repeat", type=int, default=9, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch; jax takes every core it may use")
    parser.add_argument("--step", metavar="CONFIG", help="a whole step instead")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out, inner = map(int, options.shape.split("x"))
    if options.step:
        steps(options.step, options.repeat)
        return
    if options.serve:
        ours(out, inner)
        return
    python = ROOT / ".venv-reference4/bin/python"
    if not python.exists():
        sys.exit("error: bitsandbytes' environment is missing: make reference4")
    arguments = [str(out), str(inner)]
    with (
        Side([sys.executable, __file__, "--serve", "--shape", options.shape], {"JAX_PLATFORMS": "cpu"}) as mine,
        Side([str(python), "-c", _THEIRS, *arguments, str(options.threads)], {"PYTHONPATH": None}) as theirs,
    ):
        rounds = [(mine.step(), theirs.step()) for _ in range(options.repeat + 2)][2:]
    medians = {name: statistics.median(own[name] for own, _ in rounds) for name in rounds[0][0]}
    reference = {dtype: statistics.median(their[dtype] for _, their in rounds) for dtype in DTYPES}
    ratios = {name: seconds / reference[name.split()[1]] for name, seconds in medians.items()}
    for name, ratio in ratios.items():
        print(f"{name}: {medians[name] * 1e3:.1f} ms, bitsandbytes {reference[name.split()[1]] * 1e3:.1f}, ratio {ratio:.2f}")
    asked = "import torch, bitsandbytes; print(torch.__version__, bitsandbytes.__version__)"
    torch, bitsandbytes = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    kept.write(options.out, kept.about(shape=options.shape, torch=torch, bitsandbytes=bitsandbytes, medians=medians, theirs=reference,
                                       ratios=ratios, rounds=rounds))  # fmt: skip


if __name__ == "__main__":
    main()
