"""Memory of writing a GGUF file: layers of a model's sizes, random bf16 weights, an adapter of rank 16 on every target over NF4.

    python benchmarks/gguf_memory.py [--model mixtral-8x7b] [--layers 1] [--types f16 q8_0] [--out FILE.json]

One layer of Mixtral-8x7B: a base of 3.4 GB and as much in f16; OLMoE-1B-7B whole (--layers 16): 13.8 GB twice; in a folder that is
removed. Printed is by how much the process grew at most (Linux's RssAnon: without what is mapped of the base), next to the largest tensor
of the file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import jax.numpy as jnp
import kept
import ml_dtypes
import numpy as np

from moejax.hub import gguf_file, merge, peft, streaming
from moejax.hub.names import tensors
from moejax.hub.safetensors_file import Writer
from moejax.models.build import Model, build
from moejax.models.config import LORA_TARGETS, PRESETS, LoRAConfig, Quantization


def own_bytes() -> int:
    """Memory of this process that is no mapped file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def watched(action: Callable[[], Any]) -> dict[str, float]:
    """Seconds, and by how many bytes the process grew meanwhile at most."""
    before, peak, done = own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], own_bytes())

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return {"seconds": time.perf_counter() - start, "grew_bytes": peak[0] - before}


def write_base(model: Model, folder: Path) -> int:
    """Random weights in Hub layout, one file; the bytes."""
    shapes = {name: streaming.whole_shape(model, places) for name, places in tensors(model.config).items()}
    pool = (0.02 * np.random.default_rng(0).standard_normal(1 << 27, np.float32)).astype(ml_dtypes.bfloat16)
    with Writer(folder / "model.safetensors", {name: (shape, pool.dtype) for name, shape in shapes.items()}, {"format": "pt"}) as writer:
        for number, (name, shape) in enumerate(shapes.items()):
            size = math.prod(shape)
            begin = number * 7919 * 64 % (pool.size - size)  # other numbers for each tensor
            writer.write(name, pool[begin : begin + size])
    (folder / "config.json").write_text(json.dumps(model.config.to_hub_config()))
    return 2 * sum(map(math.prod, shapes.values()))


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b"], default="mixtral-8x7b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--types", nargs="*", default=["f16", "q8_0"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = PRESETS[options.model].replace(num_layers=options.layers)
    model = build(config, quantization=Quantization(), adapter=LoRAConfig(targets=LORA_TARGETS))
    for lora in {id(lora): lora for _, lora in peft.adapted(model).values()}.values():
        for variable in (lora.a, lora.b):
            variable.set_value(jnp.full(variable.get_value().shape, 0.01, jnp.float32))
    result = kept.about(model=options.model, layers=options.layers, cases=[])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["base_bytes"] = write_base(model, folder)
        with merge.opened(model, folder) as value:
            for name in {streaming.whole_shape(model, places): name for name, places in tensors(config).items()}.values():
                value(name)  # the first call for a shape compiles
            largest = max(math.prod(shape) for shape in config.weights.values()) // options.layers
            for kind in options.types:
                file = folder / f"{kind}.gguf"

                def write(file: Path = file, kind: str = kind) -> None:
                    gguf_file.write(file, config, kind, value, {}, lambda _: None)

                case = {"type": kind} | watched(write) | {"file_bytes": file.stat().st_size, "largest_tensor_numbers": largest}
                result["cases"].append(case)
                size, rose = case["file_bytes"] / 1e9, case["grew_bytes"] / 1e9
                print(f"{kind}: {size:.2f} GB in {case['seconds']:.0f} s; the process grew by at most {rose:.2f} GB", flush=True)
                file.unlink()
    kept.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
