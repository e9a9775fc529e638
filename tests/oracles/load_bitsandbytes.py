"""Our side of save_bitsandbytes.py: codes and scales to the bit, the largest logit difference; fp4 and int8 refused."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from moejax.errors import UserError
from moejax.hub.names import tensors
from moejax.hub.weights import attribute, index_of, load_weights, read_config
from moejax.models.build import build
from moejax.models.config import QUANTIZED_MODULES, Quantization
from moejax.models.ops.quantized import is_quantized

CASES = {
    "double": Quantization(double=True),
    "single": Quantization(double=False),
    "unquantized_router": Quantization(modules=tuple(m for m in QUANTIZED_MODULES if m != "router")),
}


def load(folder, quantization):
    return load_weights(build(read_config(folder), quantization=quantization, dtype=jnp.float32), folder, jax.random.key(0))


def part(value, index):
    """One tensor of a stacked weight, quantized or not."""
    return jax.tree.map(lambda leaf: leaf[index], value)


def stored_otherwise(model, folder):
    """Names of tensors whose codes, scales or numbers are not the file's."""
    raw = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(str(path)).items()}
    different = []
    for name, (place,) in tensors(model.config).items():
        value = part(attribute(model, place.path).weight.get_value(), index_of(place))
        if is_quantized(value):
            parts = value.canonical().parts
            pairs = [(parts["codes"], raw[name])]
            pairs += [(parts[part], raw[f"{name}.{part}"]) for part in ("absmax", "nested_absmax") if part in parts]
        else:
            pairs = [(value, raw[name].astype(np.float32))]
        if not all(np.array_equal(np.asarray(ours).reshape(-1), theirs.reshape(-1)) for ours, theirs in pairs):
            different.append(name)
    return different


def logit_difference(model, folder):
    """(largest difference, largest logit)"""
    with np.load(folder / "logits.npz") as file:
        tokens, expected = jnp.asarray(file["tokens"]), file["logits"]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = np.asarray(model.logits(model(tokens, jnp.ones_like(tokens), positions)[0]))
    return float(np.abs(logits - expected).max()), float(np.abs(expected).max())


def main():
    folder, failed = Path(sys.argv[1]), False
    for case, quantization in CASES.items():
        model = load(folder / case, quantization)
        different = stored_otherwise(model, folder / case)
        difference, largest = logit_difference(model, folder / case)
        print(f"{case}: {len(different)} tensors stored otherwise; largest logit difference {difference:.2g} of {largest:.3g}")
        failed |= bool(different) or difference > 2e-5 * largest
    for case in ("fp4", "int8"):
        try:
            load(folder / case, Quantization())
            failed = True
        except UserError as error:
            print(f"{case}: {error}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
