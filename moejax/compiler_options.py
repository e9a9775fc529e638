"""The compiler's options for a GPU. Whether this machine's runs loops of data inside CUDA graphs is tried once for a driver and a jax.

Without it every tile of the experts asks the host. XLA had versions (late 2025) in which such a graph crashed when it ran again. So a
process of its own tries a small program of a step's form. Where it crashes, hangs or is wrong, a run keeps its loops on the host.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from moejax.files import cache_folder, replace_text
from moejax.gpus import GPU

GPU_OPTIONS: dict[str, str | bool] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": "1",
    "xla_gpu_dot_merger_threshold_mb": "0",
    "xla_disable_hlo_passes": "fusion-dynamic-memcpy-rewriter",
}
"""Options of the compiler for a GPU. XLA's own kinds of what goes into CUDA graphs, and loops: else a loop whose trip count depends on data
(the experts' tiles) asks the host before every iteration (a driver below 12.3 has no loops in graphs; XLA then leaves them out). One loop
is enough for a graph. A layer's slices of stacked arrays are kernels: the copies by the host that XLA makes of them are in no graph, so
that a step would be hundreds of graphs instead of one. And no joining of products with one operand in common: of a matrix and its adapter
XLA copies the whole dequantized matrix for it, in every tile."""
HOST_OPTIONS: dict[str, str | bool] = {
    "xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_experimental_parallel_async_compute_limit": "64",
}  # fmt: skip
"""And with weights in the host's memory: the scheduler that starts a fetch before what does not need it (XLA's own choice before Hopper
is another), and as many at once as an expert has arrays: by XLA's own limit of two, products would wait for all fetches but the last."""
VARIABLE = "MOEJAX_GRAPH_LOOPS"
"""In the environment: 1 or 0, whether loops go into graphs; this process's answer, or the user's."""
_KNOWN_TO_JAX = {
    "7.5": "Tesla T4", "8.0": "NVIDIA A100", "8.6": "NVIDIA A10", "8.9": "NVIDIA L4", "9.0": "NVIDIA H100", "10.0": "NVIDIA B200",
    "12.0": "NVIDIA RTX PRO 6000",
}  # fmt: skip
"""Of each compute capability a GPU that jax 0.12 knows by its name."""
SECONDS = 180.0  # jax's start on a cold disk, and two small programs compiled
_DRIVER = Path("/proc/driver/nvidia/version")


def gpu_options() -> dict[str, str | bool]:
    """`GPU_OPTIONS` for this machine's GPU: without loops in graphs where they were tried and failed (`settle`)."""
    kinds = str(GPU_OPTIONS["xla_gpu_enable_command_buffer"])
    on_host = os.environ.get(VARIABLE) == "0"
    return GPU_OPTIONS | {"xla_gpu_enable_command_buffer": kinds.replace(",WHILE", "")} if on_host else GPU_OPTIONS


def lowering_for(gpu: GPU | None) -> AbstractContextManager[Any]:
    """Within it kernels are lowered for a GPU that is not there: from 0.12 on jax asks its capability, and knows few by their names."""
    known = None if gpu is None or gpu.compiler is None else _KNOWN_TO_JAX.get(gpu.compiler.compute_capability)
    from jax import __version_info__, sharding  # not at import: what only reads the options starts without jax

    if known is None or __version_info__ < (0, 11):
        return nullcontext()
    device = sharding.AbstractDevice(device_kind=known, num_cores=None, platform="gpu")
    within: AbstractContextManager[Any] = sharding.use_abstract_mesh(sharding.AbstractMesh((), (), abstract_device=device))
    return within


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **options)` of a program with a model in it: on a GPU with `gpu_options`, and `HOST_OPTIONS` where weights lie in
    the host's memory. What it runs on is asked at its first call; `jitted` makes the function of jax."""

    @functools.cache
    def jitted(in_host: bool = False) -> Any:
        import jax

        chosen = gpu_options() | (HOST_OPTIONS if in_host else {}) if jax.default_backend() == "gpu" else None
        return jax.jit(function, compiler_options=chosen, **options)

    @functools.wraps(function)
    def call(*operands: Any) -> Any:
        from moejax.models.ops import host

        return (jitted(in_host=True) if host.nbytes(operands) else jitted())(*operands)

    call.jitted = jitted  # type: ignore[attr-defined]
    return call


def settle() -> None:
    """Set `VARIABLE`, before jax takes the GPU's memory; nothing where it is set, or no GPU is asked for."""
    if VARIABLE in os.environ or not nvidia_asked():
        return
    fine, why = answer(_key(), cache_folder() / "graph_loops.json", [sys.executable, "-m", "moejax.compiler_options"])
    if not fine:
        print(f"loops stay on the host, which is slower: in a CUDA graph a loop {why} ({VARIABLE}=1 insists)", file=sys.stderr)
    os.environ[VARIABLE] = str(int(fine))


def answer(key: str, file: Path, command: list[str], seconds: float = SECONDS) -> tuple[bool, str]:
    """(whether loops may stand in graphs, else what one did), from `file` or by running `command`, which exits with 0."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return bool(known[key][0]), str(known[key][1])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        known = {}
    print("trying loops in CUDA graphs (once for this driver and jax)", file=sys.stderr)
    # What a library says of the process's place in memory is nothing for the terminal.
    environment = os.environ | {VARIABLE: "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        found = False, f"did not end in {seconds:.0f} s"
    else:
        why = f"was wrong: {done.stdout.strip()}" if done.returncode == 1 else f"ended the process ({done.returncode})"
        found = done.returncode == 0, why
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps({key: found}) + "\n")  # of another driver or jax: of no use any more
    except OSError as error:
        print(f"warning: {file} cannot be written ({error.strerror}): loops are tried again at the next start", file=sys.stderr)
    return found


def _key() -> str:
    from importlib.metadata import version

    return f"{driver()}, jaxlib {version('jaxlib')}"


def nvidia_asked() -> bool:
    """Whether there is NVIDIA's driver, and jax may take its GPU. Without touching it."""
    return _DRIVER.is_file() and bool({"", "cuda", "gpu"} & set(os.environ.get("JAX_PLATFORMS", "").split(",")))


def driver() -> str:
    """NVIDIA's, as it names itself; empty where there is none."""
    return _DRIVER.read_text(encoding="utf-8", errors="replace").splitlines()[0] if _DRIVER.is_file() else ""


def difference(options: dict[str, Any]) -> float:
    """The largest between a program compiled with these options and without, of numbers around 1, run with several routings, twice each."""
    import jax
    import jax.numpy as jnp

    experts, rows, width, tile = 4, 64, 64, 8
    keys = jax.random.split(jax.random.key(0), 2)
    x, weights = jax.random.normal(keys[0], (rows, width)), jax.random.normal(keys[1], (experts, width, width)) / width**0.5

    def routed(x: jax.Array, sizes: jax.Array) -> jax.Array:
        def expert(x: jax.Array, of_expert: Any) -> tuple[jax.Array, None]:
            weight, start, size = of_expert

            def one(i: jax.Array, x: jax.Array) -> jax.Array:
                row = start + i * tile
                return jax.lax.dynamic_update_slice_in_dim(x, jnp.tanh(jax.lax.dynamic_slice_in_dim(x, row, tile) @ weight), row, 0)

            return jax.lax.fori_loop(0, size // tile, one, x), None

        return jax.lax.scan(expert, x, (weights, jnp.cumsum(sizes) - sizes, sizes))[0]

    plain, in_graphs = jax.jit(routed), jax.jit(routed, compiler_options=options)
    worst = 0.0
    for sizes in ([16, 0, 40, 8], [0, 0, 0, 64], [0, 0, 0, 0], [24, 24, 8, 8]) * 2:
        found, expected = (f(x, jnp.asarray(sizes)) for f in (in_graphs, plain))
        worst = max(worst, float(jnp.max(jnp.abs(found - expected))))
    return worst


def main() -> int:
    off = difference(GPU_OPTIONS)
    if off < 0.01:  # products may be rounded to 10 bits on either side
        return 0
    print(f"by {off:.3g} of 1")
    return 1


if __name__ == "__main__":
    sys.exit(main())
