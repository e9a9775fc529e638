"""What published models' steps are on TPU slices that are not there, read from the programs that XLA compiles for them: bytes a chip,
FLOPs, padded arrays. Compiled, never run: there are no seconds. `make aot-tpu`.

    python benchmarks/tpu_programs.py --out benchmarks/results/<date>-tpu-compiled.json [--only mixtral] [--layers 2]

flops_ratio: FLOPs of a chip's program, its loops counted, over those of a step that computes the forward pass twice (attention by kernels
is in the second alone). moved_gb: of the chip's memory, next to the least (floor_gb, moejax/estimator/floors.py: what fits the chip's own
memory need not move; staged_gb: if all of it did). padded: arrays of more than 16 MB that take a tenth more than their numbers.
usable_gb: what libtpu leaves of a chip's memory; host_gb: in the host's. compile_cpu_seconds: of all threads; they keep two cores busy.
Needs libtpu (pip install -e '.[aot-tpu]', make .venv-aot-tpu/.installed); JAX_PLATFORMS=cpu is set here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent))

import floors
import gpu_model
import kept

from moejax import config, installation, tpus
from moejax.errors import UserError

ROOT = Path(__file__).parent.parent


ON_CHIP = 64 << 20
"""Half of the 128 MiB of a v5e's and v6e's own vector memory: what comes next is fetched meanwhile."""


class Case(NamedTuple):
    """rows, row_tokens: of a chip. weights: of the mesh, None: one chip. bar_gb: the most that a chip may be asked for."""

    config: str
    target: str
    weights: str | None
    rows: int
    row_tokens: int
    bar_gb: float | None = None
    overrides: tuple[str, ...] = ()


R16 = ("adapter.rank=16", "adapter.alpha=32")
R8 = ("adapter.rank=8", "adapter.alpha=16", "placement.tables=device")
HOST = ("placement.experts=host",)
CASES = (
    Case("olmoe_1b_7b", "v5e-1", None, 2, 512, 15.75),
    Case("mixtral_8x7b_cs_sparse", "v5e-8", "spread", 8, 512, 10.9, R16),
    Case("mixtral_8x7b_cs_sparse", "v5e-8", "experts", 8, 512, 10.9, R16),
    Case("mixtral_8x7b_cs_sparse", "v6e-1", None, 2, 512, 29.8, R16),
    Case("qwen3_30b_a3b_24gb", "v5e-8", "spread", 2, 2048, 12.0, R16),
    Case("qwen3_30b_a3b_24gb", "v5e-8", "experts", 2, 2048, 12.0, R16),
    Case("qwen3_30b_a3b_24gb", "v5e-4", "spread", 2, 2048, 15.75, R16),
    Case("qwen3_30b_a3b_24gb", "v5e-4", "experts", 2, 2048, 15.75, R16),
    Case("gpt_oss_20b", "v5e-4", "spread", 2, 512, 15.75, R8),
    Case("gpt_oss_20b", "v5e-4", "experts", 2, 512, 15.75, R8),
    Case("mixtral_8x7b_cs_sparse", "v5e-1", None, 2, 512, 15.75, R16 + HOST),
    Case("blackmamba_2.8b_cs_sparse", "v6e-1", None, 2, 512, 26.0),
)


def trips(repeats: dict[str, int], windowed: float, routed: Any, path: str, branch: int | None) -> float:
    """How often a loop or a branch runs: libtpu's programs do not say. windowed: of the layers those whose attention has a window. Raises
    ValueError for one that is not known."""
    if branch is not None and "attention" in path.split("/"):
        return windowed if branch else 1 - windowed
    if branch is None and "tiles" not in path:
        if "searchsorted" in path:  # of the kernels' tables: no product in it
            return 1
        where = next(part for part in reversed(path.removesuffix("/while").split("/")) if part != "closed_call")
        found = next((count for name, count in repeats.items() if name in where), None)
        if found is not None:
            return found
    if routed is None:
        raise ValueError(f"{path}: how often this loop runs is not known")
    return float(routed(path, branch))


def compiled(case: Case, layers: int | None = None) -> dict[str, Any]:
    """One step's program, and what is read from it. Raises UserError where it does not compile."""
    from moejax.estimator.floors import floors as of_memory
    from moejax.estimator.sizes import architecture_of
    from moejax.models.config import specs
    from moejax.models.ops import choice
    from moejax.profiling import layouts
    from moejax.training import experts
    from moejax.training.program import TrainProgram

    target = tpus.find(case.target)
    assert target is not None
    chosen = [] if layers is None else [f"model.overrides.num_layers={layers}"]
    rows = case.rows * target.count
    chosen += [] if case.weights is None else [f"mesh.devices={target.count}", f"mesh.weights={case.weights}"]
    chosen.append(f"data.batch_rows={rows}")
    experiment = config.load(ROOT / "configs" / f"{case.config}.yaml", [*case.overrides, "training.remat=full", *chosen])
    sizes = architecture_of(experiment)
    program, begun = TrainProgram(experiment, sizes, gpu=target.chip), time.process_time()
    c = program.compile(rows, case.row_tokens)
    cpu_seconds = time.process_time() - begun
    dealt = target.count if case.weights == "experts" else 1
    tokens = case.rows * dealt * case.row_tokens
    plan = experts.plan(experiment, sizes, tokens, target.chip)
    routed = None if plan is None else experts.routed(plan, experts.random_loads(sizes, tokens)[..., : sizes.num_experts // dealt])
    chunks = -(-case.rows * case.row_tokens // experiment.training.loss_chunk(sizes.vocab_size))
    mixer = sizes.stacks[0].block.mixer
    repeats = {"kv_groups": case.rows * getattr(mixer, "kv_heads", 0)}
    repeats |= {"layers": sizes.blocks, "moe": sizes.num_experts // dealt, "loss": chunks}
    if isinstance(mixer, specs.Mamba):
        scan = choice.scan(target.chip.cuda_name or "", case.rows, case.row_tokens, mixer.inner, experiment.model.scan)[1]
        repeats["scan"] = -(-case.row_tokens // scan)
    windows = [window != specs.EVERYWHERE for stack in sizes.stacks for window in stack.windows or ()]
    of_windows = partial(trips, repeats, sum(windows) / sizes.blocks)
    counted = gpu_model.step(c.executable, gpu_model.Thunks(), partial(of_windows, routed), gpu_model.Rates())
    again = 4 / 3 if experiment.adapter is None else 3 / 2
    flops = again * floors.model_flops(experiment, case.rows, case.row_tokens)
    padded = layouts.padded(c.executable.as_text())
    return case._asdict() | {
        "layers": sizes.num_layers, "backend": "dense" if plan is None else plan.backend,
        "attention": " ".join(experts.announce_attention(experiment, sizes, target.chip.cuda_name or "")),
        "peak_gb": round(c.peak_bytes / 1e9, 3), "arguments_gb": round(c.argument_bytes / 1e9, 3),
        "temporaries_gb": round(c.temporary_bytes / 1e9, 3), "host_gb": round(c.host_bytes / 1e9, 3),
        "usable_gb": round((target.chip.memory_bytes or 0) / 1e9, 2),
        "compile_seconds": round(c.seconds, 1), "compile_cpu_seconds": round(cpu_seconds, 1),
        "tflop": round(counted.flops / 1e12, 2), "flops_ratio": round(counted.flops / flops, 3),
        "moved_gb": round(counted.bytes / 1e9, 1),
        **{name: round(sum(s.bytes for s in of_memory(experiment, sizes, case.rows, case.row_tokens, chip)) / 1e9, 1)
           for name, chip in (("floor_gb", ON_CHIP), ("staged_gb", 0))},
        "padded": [{"array": b.shape, "gb": round(b.padded_bytes / 1e9, 3), "times": round(b.factor, 2)} for b in padded],
    }  # fmt: skip


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of the cases those whose config, target and mode have this text")
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--out", type=Path, help="JSON of everything, with versions; cases that are in it stay")
    options = parser.parse_args()
    report = kept.about(versions=installation.versions(), steps=[])
    if options.out is not None and options.out.exists():
        report["steps"] = json.loads(options.out.read_text(encoding="utf-8"))["steps"]
    failed = 0
    for case in CASES:
        if options.only not in f"{case.config} {case.target} {case.weights}":
            continue
        try:
            told = compiled(case, options.layers)
        except UserError as error:
            told, failed = case._asdict() | {"error": str(error)}, failed + 1
        print(json.dumps(told), flush=True)
        same = {name: told[name] for name in ("config", "target", "weights", "rows", "row_tokens")}
        report["steps"] = [*(step for step in report["steps"] if not same.items() <= step.items()), told]
        kept.write(options.out, report)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
