"""Memory and speed of merging: a random 1.1 GB Mixtral (bf16, shards) with an adapter over NF4, merged into shards of 100 MB.

python benchmarks/export_memory.py   # writes to a temporary folder and removes it; prints one line
"""

import argparse
import os
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from models.build import build
from models.config import LoRAConfig, MixtralConfig, Quantization
from moejax.hub import merge, peft, save, weights
from moejax.hub.names import tensors

CONFIG = MixtralConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=3584, num_layers=6, num_heads=16, num_kv_heads=4, head_dim=64
)
SHARD_BYTES = 100_000_000


def own_bytes() -> int:
    """Memory of this process that is no mapped file (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def write_base(model, folder: Path) -> None:
    """Random weights in Hub layout, one file a layer."""
    rng = np.random.default_rng(0)
    shapes = {name: merge._whole_shape(model, places) for name, places in tensors(CONFIG).items()}
    sizes = {name: int(np.prod(shape)) * 2 for name, shape in shapes.items()}
    where = {}
    for i, names in enumerate(merge.plan_shards(sizes, 200_000_000)):
        file = f"model-{i}.safetensors"
        arrays = {n: (0.02 * rng.standard_normal(shapes[n], np.float32)).astype(ml_dtypes.bfloat16) for n in names}
        save_file(arrays, str(folder / file))
        where |= dict.fromkeys(names, file)
    save.write_json(folder / "model.safetensors.index.json", {"weight_map": where})


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(CONFIG, quantization=Quantization(), adapter=LoRAConfig())
        write_base(model, folder)
        for lora in {id(lora): lora for _, lora in peft.adapted(model).values()}.values():
            for variable in (lora.a, lora.b):
                variable.set_value(jnp.full(variable.get_value().shape, 0.01, jnp.float32))
        with ExitStack() as stack:  # the first call compiles
            merge.merged_tensor(model, "lm_head.weight", weights.open_tensors(folder, stack), folder)
        before, peak, done = own_bytes(), [0], threading.Event()

        def watch():
            while not done.wait(0.01):
                peak[0] = max(peak[0], own_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        total = merge.save_merged(model, folder, folder / "merged", shard_bytes=SHARD_BYTES)
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    print(
        f"merged {total / 1e9:.2f} GB in {seconds:.1f} s ({total / 1e6 / seconds:.0f} MB/s of bf16); memory rose by at most "
        f"{(peak[0] - before) / 1e9:.2f} GB with shards of {SHARD_BYTES / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
