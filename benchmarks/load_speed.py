"""Speed and memory of loading a checkpoint as NF4, at first and from the cache of quantized weights.

    python benchmarks/load_speed.py DIR [--layers 2]

DIR without a checkpoint gets a random Mixtral in Hub layout with the 8x7B's matrices, 6.3 GB of bf16 in shards (delete it afterwards).
Each load is a process of its own; the files leave the page cache before it, and before they are read plainly (16 MiB at a time) for
comparison. The peak is the kernel's (VmHWM): all of the process, with Python, jax and mapped pages; on a CPU with the model itself.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.hub import merge, save, streaming, weights
from moejax.hub.names import tensors
from moejax.hub.safetensors_file import Writer
from moejax.models.build import build
from moejax.models.config import PRESETS, Quantization

SHARD_BYTES = 2_200_000_000


def make(folder, layers):
    config = PRESETS["mixtral-8x7b"].replace(num_layers=layers)
    model = build(config, param_dtype=jnp.bfloat16)
    shapes = {name: streaming.whole_shape(model, places) for name, places in tensors(config).items()}
    pool = (0.02 * np.random.default_rng(0).standard_normal(1 << 27, np.float32)).astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    where = {}
    for number, names in enumerate(merge.plan_shards({n: 2 * math.prod(s) for n, s in shapes.items()}, SHARD_BYTES), 1):
        file = f"model-{number:05d}.safetensors"
        with Writer(folder / file, {n: (shapes[n], pool.dtype) for n in names}, {"format": "pt"}) as writer:
            for name in names:
                size = math.prod(shapes[name])
                start = (len(where) * 7919 * 64) % (pool.size - size)  # other numbers for each tensor
                writer.write(name, pool[start : start + size])
                where[name] = file
    save.write_json(folder / "model.safetensors.index.json", {"weight_map": where})
    save.write_config(config, folder, jnp.bfloat16)
    print(f"{folder}: {2 * sum(map(math.prod, shapes.values())) / 1e9:.2f} GB of bfloat16 in {len(set(where.values()))} shards")


def peak_bytes():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)


def forget(folder):
    """Take a folder's files out of the page cache; their bytes."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        total += path.stat().st_size
    return total


def read_plainly(folder):
    """Seconds to read a folder's files once, and to do nothing with them."""
    start = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return time.perf_counter() - start


def load_once(folder, cache):
    model = build(weights.read_config(folder), quantization=Quantization())
    key = jax.block_until_ready(jax.random.split(jax.random.key(0)))[0]  # jax's own start is no part of a load
    before, start, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    weights.load_weights(model, folder, key, cache=cache)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    values = [v.get_value() for _, v in weights.base_variables(model)]
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(values))
    peak = peak_bytes()
    print(*weights.report(model), sep="\n")
    print(
        f"{seconds:.1f} s ({cpu:.1f} s of CPU); model {stored / 1e9:.2f} GB; peak {peak / 1e9:.2f} GB, the model and "
        f"{(peak - stored) / 1e9:.2f} GB ({before / 1e9:.2f} before the load)\nseconds {seconds}"
    )


def load(folder):
    with tempfile.TemporaryDirectory(dir=folder) as name:
        cache = Path(name)
        print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before")
        # What a page cache can be relied on to keep is the cache of quantized weights alone.
        for what, source, warm in (
            ("bf16 input, quantized and cached, not in memory", folder, False),
            ("from the cache, not in memory", cache, False),
            ("from the cache, in the page cache", cache, True),
        ):
            size = forget(source)
            disk = size / 1e6 / read_plainly(source)
            if not warm:
                forget(source)
            command = [sys.executable, __file__, str(folder), "--cache", str(cache)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            text, _, seconds = out.rpartition("\nseconds ")
            print(f"{what}: {size / 1e9:.2f} GB, {size / 1e6 / float(seconds):.0f} MB/s; the disk, read plainly, {disk:.0f} MB/s\n{text}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--layers", type=int, default=2, help="of the random model")
    parser.add_argument("--cache", type=Path, help="load once, with this cache")
    o = parser.parse_args()
    if o.cache:
        load_once(o.folder, o.cache)
        return
    if not (o.folder / "config.json").exists():
        make(o.folder, o.layers)
    load(o.folder)


if __name__ == "__main__":
    main()
