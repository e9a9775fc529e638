"""Weights that a name and a shape decide, here and in the tests: no vectors have to hold them."""

import zlib

import numpy as np


def weight(name, shape):
    """Drawn wide, so that neither routing nor attention is near uniform; norms around 1."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)
    return 1 + np.float32(0.2) * noise if "norm" in name else np.float32(0.3) * noise


GRADIENT_STEPS = 25


def gradient(name, step, shape):
    """Of a weight at a step: magnitudes over two decades, part of it the same at every step; a row of zeros; all of it at step 3."""
    draw = np.random.default_rng([zlib.crc32(name.encode()), step])
    of_weight = np.random.default_rng(zlib.crc32(name.encode()))
    scale, mean = 10.0 ** of_weight.uniform(-4, -2, shape), of_weight.normal(size=shape)
    found = (scale * (mean + draw.normal(size=shape))).astype(np.float32)
    found[0] = 0
    return found * np.float32(step != 3)


def in_mxfp4(shapes):
    """The files' tensors, by name, of a gpt-oss whose tensors have these shapes: experts' matrices [E, in, out] as blocks of any codes, and
    scales that make numbers up to 0.19 of them."""
    files = {}
    for name, shape in shapes.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            files[name] = weight(name, shape)
            continue
        draw, (experts, columns, rows) = np.random.default_rng(zlib.crc32(name.encode())), shape
        files[f"{name}_blocks"] = draw.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        files[f"{name}_scales"] = draw.integers(120, 123, (experts, rows, columns // 32), np.uint8)
    return files
