"""A checkpoint into the parts of a mesh: what the host and each device hold while it is loaded, next to what they should hold.

    python benchmarks/sharded_loading.py --folder DIR [--layers 1] [--devices 4]

Makes a checkpoint of random bytes in the shape of Mixtral-8x22B with fewer layers in DIR (5.6 GB with one; removed afterwards) and loads it
over virtual devices of this CPU in each mode of mesh.weights: experts first, from the checkpoint, which writes the quantized cache; then
each mode from that. A CPU's devices lie in the host's memory: what the process holds beyond their bytes is what loading takes of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

MODES = ("whole", "spread", "experts")
SHAPE = {"hidden_size": 6144, "intermediate_size": 16384, "num_heads": 48, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 32000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--load", metavar="MODE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options)
        return
    options.folder.mkdir(parents=True)
    try:
        print(f"checkpoint: {make(options) / 1e9:.2f} GB of {options.layers} layers", flush=True)
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        for mode in ("experts", *MODES):  # the first one writes the cache
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--load", mode], env=environment, check=True)
    finally:
        shutil.rmtree(options.folder)


def sizes(layers: int) -> Any:
    from moejax.models.config import PRESETS

    return PRESETS["mixtral-8x7b"].replace(**SHAPE, num_layers=layers)


def make(options: argparse.Namespace) -> int:
    """Random bf16 below 2: no exponent of infinity or NaN."""
    import numpy as np

    from moejax.hub.names import tensors
    from moejax.hub.save import write_model
    from moejax.hub.streaming import whole_shape
    from moejax.models.build import build
    from moejax.models.config import Quantization

    model, rng = build(sizes(options.layers), quantization=Quantization()), np.random.default_rng(0)
    shapes = {name: whole_shape(model, places) for name, places in tensors(model.config).items()}

    def value(name: str) -> Any:
        import ml_dtypes

        count = int(np.prod(shapes[name]))
        return (np.frombuffer(rng.bytes(2 * count), np.uint16) & 0xBFFF).view(ml_dtypes.bfloat16).reshape(shapes[name])

    return write_model(model, options.folder, value, "bfloat16", shard_bytes=5e9)


def load(options: argparse.Namespace) -> None:
    import jax
    from flax import nnx

    from moejax import mesh
    from moejax.config_mesh import MeshConfig
    from moejax.hub import buffers
    from moejax.hub.model import laid_out
    from moejax.hub.weights import load_weights
    from moejax.models.build import build
    from moejax.models.config import Quantization

    devices = mesh.devices(MeshConfig(devices=options.devices, weights=options.load))
    most, put = dict.fromkeys(jax.devices(), 0), buffers.Buffer.put

    def watched(*arguments: Any) -> None:
        put(*arguments)
        for device, there in on_devices().items():
            most[device] = max(most[device], there)

    buffers.Buffer.put = watched  # type: ignore[method-assign]
    cached = any(options.folder.glob("cache/*.safetensors"))
    model = build(sizes(options.layers), quantization=Quantization())
    laid_out(model, devices)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter()
    load_weights(model, options.folder, jax.random.key(0), cache=options.folder / "cache")
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    state = nnx.state(model)
    share, held = mesh.device_bytes(state, devices.of_weights(state)), on_devices()
    report = {
        "mode": options.load, "from": "cache" if cached else "checkpoint", "seconds": round(seconds), "share_gb": gb(share),
        "devices_gb": [gb(n) for n in held.values()], "devices_peak_gb": [gb(n) for n in most.values()],
        "host_peak_gb": gb(peak), "host_beyond_devices_gb": gb(peak - before - sum(held.values())),
    }  # fmt: skip
    print(json.dumps(report), flush=True)


def on_devices() -> dict[Any, int]:
    """Bytes of the arrays on each device."""
    import jax

    shards = [shard for array in jax.live_arrays() for shard in array.addressable_shards]
    found = {(shard.device, shard.data.unsafe_buffer_pointer()): shard.data.nbytes for shard in shards}
    return {device: sum(n for (on, _), n in found.items() if on == device) for device in jax.devices()}


def gb(count: float) -> float:
    return round(count / 1e9, 3)


if __name__ == "__main__":
    main()
