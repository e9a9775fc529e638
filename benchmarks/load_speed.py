"""Speed and memory of loading a checkpoint as NF4, at first and from the cache of quantized weights.

python benchmarks/make_checkpoint.py /tmp/checkpoint && python benchmarks/load_speed.py /tmp/checkpoint

Each load is a process of its own; the files leave the page cache before it, and before they are read plainly (16 MiB at a time) for
comparison: into one piece of memory again and again, and, in a process of its own too, into as much new memory as they are large. The peak
is the kernel's (VmHWM): all of the process, with Python, jax and mapped pages; on a CPU with the model itself.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def forget(folder: Path) -> int:
    """Take a folder's files out of the page cache; their bytes."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        total += path.stat().st_size
    return total


def read_plainly(folder: Path) -> float:
    """Seconds to read a folder's files once, and to do nothing with them."""
    start = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return time.perf_counter() - start


def read_into_new_memory(folder: Path) -> None:
    """Print the seconds to read a folder's files once, and to keep all of it."""
    start, kept = time.perf_counter(), []
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while piece := file.read(1 << 24):
                kept.append(piece)
    print(time.perf_counter() - start)


def peak_bytes() -> int:
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)


def load(folder: Path, cache: Path) -> None:
    import jax

    from moejax.hub import weights
    from moejax.models.build import build
    from moejax.models.config import Quantization
    from moejax.terminal import Console

    model = build(weights.read_config(folder), quantization=Quantization())
    key = jax.block_until_ready(jax.random.split(jax.random.key(0)))[0]  # jax's own start is no part of a load
    before, start, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    weights.load_weights(model, folder, key, cache=cache, console=Console())
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    values = [v.get_value() for _, v in weights.base_variables(model)]
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(values))
    extra = peak_bytes() - stored
    print(
        f"{seconds:.1f} s ({cpu:.1f} s of CPU); model {stored / 1e9:.2f} GB; peak {peak_bytes() / 1e9:.2f} GB, the model and "
        f"{extra / 1e9:.2f} GB ({before / 1e9:.2f} before the load)\nseconds {seconds}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, default=None, help="load once, with this cache")
    parser.add_argument("--plain", action="store_true", help="read the folder's files into memory once and do nothing with them")
    options = parser.parse_args()
    if options.plain:
        read_into_new_memory(options.folder)
        return
    if options.cache:
        load(options.folder, options.cache)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cache = Path(folder)
        print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before")
        for what, source in (("bf16 input, quantized and cached", options.folder), ("from the cache", cache)):
            size = forget(source)
            disk = size / 1e6 / read_plainly(source)
            forget(source)
            new = subprocess.run([sys.executable, __file__, str(source), "--plain"], check=True, stdout=subprocess.PIPE, text=True).stdout
            into_new = size / 1e6 / float(new)
            for state in ("not in memory", "in the page cache"):
                if state == "not in memory":
                    forget(source)
                elif source == options.folder:
                    continue  # larger than what a page cache can be relied on to keep
                command = [sys.executable, __file__, str(options.folder), "--cache", str(cache)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                text, _, seconds = out.rpartition("\nseconds ")
                speed = size / 1e6 / float(seconds)
                print(
                    f"{what}, {state}: {size / 1e9:.2f} GB, {speed:.0f} MB/s; the disk, read plainly, {disk:.0f} MB/s, "
                    f"into new memory {into_new:.0f} MB/s\n{text}"
                )


if __name__ == "__main__":
    main()
