"""Makes tests/vectors/mixtral-cpu.xplane.pb.gz: two traced steps of a tiny Mixtral on a CPU. Needs moejax alone:

    PYTHONPATH=. python tests/oracles/trace.py        # JAX_PLATFORMS=cuda: mixtral-gpu.xplane.pb.gz, on a GPU

What is kept is what the reader reads: programs that did not run in the trace, and the lines of the host's own threads, are left out.
"""

import gzip
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.data.batch import Batch
from moejax.models.build import build
from moejax.models.config import PRESETS, LoRAConfig, Quantization
from moejax.profiling import xplane
from moejax.profiling.capture import compile_profiled
from moejax.training.program import initial_state, split
from moejax.training.step import Objective, make_train_step

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
STEPS, ROWS, TOKENS = 2, 2, 128


def main() -> None:
    config = PRESETS["mixtral-tiny"].replace(vocab_size=256, **SIZES)
    adapter = LoRAConfig(8, 16.0, 0.0, ("w1", "w2", "w3", "gate", "q_proj", "v_proj"))
    model = build(config, key=jax.random.key(0), adapter=adapter, quantization=Quantization(), dtype=jnp.float32)
    graphdef, trainable, frozen = split(model, full=False)
    schedule = optax.constant_schedule(1e-3)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    function = make_train_step(Objective(graphdef, full=False, remat="full"), optimizer, schedule, 0)
    shape = (1, ROWS, TOKENS)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    ones, positions = np.ones(shape, np.int32), np.broadcast_to(np.arange(TOKENS, dtype=np.int32), shape)
    batch = jax.device_put(Batch(tokens, np.roll(tokens, -1, -1), np.ones(shape, np.float32), ones, positions))
    state = initial_state(trainable, optimizer)
    step = compile_profiled(jax.jit(function, donate_argnums=(0,)).lower(state, frozen, batch))
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
    jax.block_until_ready(metrics)
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 1, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for number in range(1, STEPS + 1):
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, metrics = step(state, frozen, batch)
                    jax.block_until_ready(metrics)
        content = smaller(xplane.find(Path(folder)).read_bytes())
    out = Path(__file__).parent.parent / "vectors" / f"mixtral-{jax.default_backend()}.xplane.pb.gz"
    out.write_bytes(gzip.compress(content, 9, mtime=0))
    print(f"{out.name}: {out.stat().st_size / 1e3:.0f} kB")


def smaller(content: bytes) -> bytes:
    """The trace without programs that did not run in it, and without the machine's name."""
    space = xplane.MESSAGES["XSpace"].FromString(content)
    del space.hostnames[:]
    for plane in space.planes:
        if plane.name == "/host:metadata":
            for key in [k for k, entry in plane.event_metadata.items() if not entry.name.startswith("jit_step(")]:
                del plane.event_metadata[key]
    return space.SerializeToString()


if __name__ == "__main__":
    main()
