"""A random Mixtral in Hub layout with the 8x7B's matrices and few layers: python benchmarks/make_checkpoint.py DIR [--layers 2]

2 layers: 6.3 GB of bfloat16 in shards. For benchmarks/load_speed.py; delete it afterwards.
"""

import argparse
import json
import math
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.hub.names import tensors
from moejax.hub.safetensors_file import Writer
from moejax.hub.weights import attribute
from moejax.models.build import build
from moejax.models.config import PRESETS


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=3)
    options = parser.parse_args()
    config = PRESETS["mixtral-8x7b"].replace(num_layers=options.layers)
    model = build(config, param_dtype=jnp.bfloat16)
    shapes = {}
    for name, (place,) in tensors(config).items():
        value = getattr(attribute(model, place.path), place.attr).get_value()
        shapes[name] = value.shape[(place.layer is not None) + (place.expert is not None) :]
    pool = (0.02 * np.random.default_rng(0).standard_normal(1 << 27, np.float32)).astype(ml_dtypes.bfloat16)
    names, weight_map = list(shapes), {}
    each = -(-len(names) // options.shards)
    for shard in range(options.shards):
        file = f"model-{shard + 1:05d}-of-{options.shards:05d}.safetensors"
        part = names[shard * each : (shard + 1) * each]
        with Writer(options.folder / file, {n: (shapes[n], pool.dtype) for n in part}, {"format": "pt"}) as writer:
            for name in part:
                size = math.prod(shapes[name])
                start = (len(weight_map) * 7919 * 64) % (pool.size - size)  # other numbers for each tensor
                writer.write(name, pool[start : start + size])
                weight_map[name] = file
    (options.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (options.folder / "config.json").write_text(json.dumps(config.to_hub_config()))
    print(f"{options.folder}: {2 * sum(math.prod(s) for s in shapes.values()) / 1e9:.2f} GB of bfloat16 in {options.shards} shards")


if __name__ == "__main__":
    main()
