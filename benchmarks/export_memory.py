"""Memory and speed of merging and of verifying: a random Mixtral (bf16, shards) with an adapter over NF4, merged into shards.

python benchmarks/export_memory.py --layers 34   # 6.3 GB, and as much merged, in a folder that is removed; 6 (the default): 1.1 GB
"""

import argparse
import os
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from moejax.hub import layerwise, merge, peft, save, streaming, verification, weights
from moejax.hub.names import tensors
from moejax.models.build import build
from moejax.models.config import LoRAConfig, MixtralConfig, Quantization
from moejax.runs import export

CONFIG = MixtralConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=3584, num_heads=16, num_kv_heads=4, head_dim=64
)


def own_bytes() -> int:
    """Memory of this process that is no mapped file (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def write_base(model, folder: Path) -> None:
    """Random weights in Hub layout, one file a layer."""
    rng = np.random.default_rng(0)
    shapes = {name: streaming.whole_shape(model, places) for name, places in tensors(model.config).items()}
    sizes = {name: int(np.prod(shape)) * 2 for name, shape in shapes.items()}
    where = {}
    for i, names in enumerate(merge.plan_shards(sizes, 200_000_000)):
        file = f"model-{i}.safetensors"
        arrays = {n: (0.02 * rng.standard_normal(shapes[n], np.float32)).astype(ml_dtypes.bfloat16) for n in names}
        save_file(arrays, str(folder / file))
        where |= dict.fromkeys(names, file)
    save.write_json(folder / "model.safetensors.index.json", {"weight_map": where})


def watched(action):
    """(seconds, by how many bytes the process grew meanwhile at most, result)"""
    before, peak, done = own_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = action()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    return seconds, peak[0] - before, result


def _told(total, seconds, rose):
    speed = total / 1e6 / seconds
    return f"{total / 1e9:.2f} GB of bf16 in {seconds:.1f} s ({speed:.0f} MB/s); memory rose by at most {rose / 1e9:.2f} GB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    config = CONFIG.replace(num_layers=parser.parse_args().layers)
    arguments = {"quantization": Quantization(), "adapter": LoRAConfig()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(config, **arguments)
        write_base(model, folder)
        for lora in {id(lora): lora for _, lora in peft.adapted(model).values()}.values():
            for variable in (lora.a, lora.b):
                variable.set_value(jnp.full(variable.get_value().shape, 0.01, jnp.float32))
        peft.save_adapter(model, folder / "adapter", "base")
        with ExitStack() as stack:  # the first call compiles
            merge.merged_tensor(model, "lm_head.weight", weights.open_tensors(folder, stack, CONFIG), folder)
        merged = partial(merge.save_merged, model, folder, folder / "merged", shard_bytes=2_000_000_000)
        seconds, rose, total = watched(merged)
        print(f"merged {_told(total, seconds, rose)}")
        del model, merged
        tokens = np.arange(1, 65, dtype=np.int32)
        checkpoints = (
            layerwise.Checkpoint(config, folder, [folder / "adapter"], arguments),
            layerwise.Checkpoint(config, folder / "merged", (), {"param_dtype": jnp.bfloat16}),
        )
        seconds, rose, found = watched(lambda: verification.compare(checkpoints, tokens, export.TOLERANCE["merged"]))
        print(f"verified base and merged: {_told(2 * total, seconds, rose)}; logits differ by {100 * found.share:.2g} % of the largest")


if __name__ == "__main__":
    main()
