"""Where a step's time goes in both frameworks, next to what the paper printed: `make frameworks`.

    python benchmarks/side_by_side.py [--only RUN …] [--reference4 PYTHON] [--reference5 PYTHON]

Profiles small models on this machine on both sides (moejax profile; benchmarks/torch_run.py --profile), draws them as `moejax breakdown`
does (one of the figures goes to docs/frameworks/), and writes a table between marks in results/frameworks.md and
benchmarks/results/DATE-side-by-side.json. Shares compare with the paper's; seconds do not (another model, another machine).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import kept
import torch_run
from curves import between

from moejax import config as configuration
from moejax.commands import breakdown
from moejax.device import cpu_name
from moejax.profiling import schema
from moejax.profiling.bars import Bars, draw, study, takeaways
from moejax.profiling.scopes import OUTSIDE

MIXTRAL, MAMBA = "configs/bench_mixtral_tiny.yaml", "configs/bench_blackmamba_tiny.yaml"
QWEN3, OLMOE = "configs/bench_qwen3_moe_tiny.yaml", "configs/bench_olmoe_tiny.yaml"
SHARED = ["quantization.format=none", "adapter.share=[w1,w3]"]
DENSE, MAMBA_ROWS = "model.experts_per_token=8", ["data.row_tokens=128", "data.max_length=128", "data.batch_rows=30"]
RUNS: dict[str, tuple[str, str, list[str], int]] = {
    "mixtral-sparse": (MIXTRAL, "study", [], 10),
    "mixtral-dense": (MIXTRAL, "study", [DENSE], 10),
    "blackmamba-sparse": (MAMBA, "plain", MAMBA_ROWS, 30),
    "blackmamba-dense": (MAMBA, "plain", [*MAMBA_ROWS, DENSE], 30),
    "mixtral-sparse-lora": (MIXTRAL, "today", SHARED, 10),
    "qwen3_moe-sparse": (QWEN3, "study", [], 10),
    "qwen3_moe-sparse-lora": (QWEN3, "today", SHARED, 10),
    "olmoe-sparse": (OLMOE, "study", [], 10),
    "olmoe-sparse-lora": (OLMOE, "today", SHARED, 10),
}
"""Run (model, kind, …): config, stack, overrides, and the batch of the study's bars next to it, where it has that model. 4-bit weights are
bitsandbytes' own."""


def profile(name: str, pythons: dict[str, Path], folder: Path) -> list[Path]:
    """Both sides' folders."""
    config, stack, overrides, _ = RUNS[name]
    overrides = [*overrides, f"name={name}", f"runs_dir={folder}"]
    torch_run.moejax(["profile", config, *overrides], folder / name)
    experiment = configuration.load_profiled(ROOT / config, overrides)
    theirs = folder / f"{name}-{stack}"
    torch_run.run(experiment, stack, theirs, pythons[stack], ["--profile", "--base", "nf4"])
    return [folder / name, theirs]


def described(folder: Path, bars: Bars) -> dict[str, Any]:
    """What is kept of a run."""
    p = schema.read(folder)
    seconds = {"step_seconds": p.step_seconds.model_dump(), "phases": dict(bars.phases), "idle": bars.idle}
    parts = {"layers": dict(bars.layers), "moe_kernels": dict(bars.kernels), "takeaways": takeaways(bars)}
    parts["attributed"] = 1 - bars.layers.get(OUTSIDE, 0.0) / sum(bars.layers.values())
    return {"framework": p.framework, "versions": p.versions, "backend": p.moe.backend} | seconds | parts


def beside(name: str) -> list[Bars]:
    """The study's bars of this run's model, kind and batch; none of a model that it has not."""
    return [bars for bars in study(*name.split("-")[:2]) if f"batch {RUNS[name][3]}" in bars.name]


SHOWN = (
    "MoE, of the layers' time", "matrix products, of the MoE's time", "dequantization, of the MoE's time",
    "backward with recomputation / forward",
)  # fmt: skip
RATIO = "dense step / sparse step"


def shares(name: str, results: dict[str, Any]) -> dict[str, str]:
    """One run's cells, each "paper/PyTorch/moejax"; "–" where the paper has no figure."""
    paper, sides = [takeaways(bars) for bars in beside(name)], [results[name][side] for side in ("pytorch", "moejax")]
    three = [paper[0] if paper else {}, *(side["takeaways"] for side in sides)]
    cells = {what: _cell(what, *(side.get(what) for side in three)) for what in SHOWN}
    return cells | ({RATIO: ratio(name, results)} if name in _SPARSE else {})


def _cell(what: str, *values: float | None) -> str:
    ratios = "/" in what
    figures = "/".join("–" if value is None else f"{value:.2f}" if ratios else f"{100 * value:.0f}" for value in values)
    return figures if ratios else f"{figures} %"


_SPARSE = {"mixtral-dense": "mixtral-sparse", "blackmamba-dense": "blackmamba-sparse"}


def ratio(dense: str, results: dict[str, Any]) -> str:
    """Seconds of a dense step over those of a sparse one at the same batch: the paper's, PyTorch's, ours."""
    if _SPARSE[dense] not in results:
        return "–"
    pair = (dense, _SPARSE[dense])
    paper = [sum(beside(name)[0].phases.values()) for name in pair]
    sides = [[results[n][side]["step_seconds"]["median"] for n in pair] for side in ("pytorch", "moejax")]
    return _cell(RATIO, *(above / below for above, below in (paper, *sides)))


def table(results: dict[str, Any]) -> str:
    """A line a run; a column a share."""
    cells = {name: shares(name, results) for name in results}
    columns = list(dict.fromkeys(what for line in cells.values() for what in line))
    lines = [f"| run | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(line.get(what, '–') for what in columns)} |" for name, line in cells.items()]
    return "\n".join(lines) + "\n"


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), help="these runs; none named: the table again")
    torch_run.add_references(parser)
    parser.add_argument("--runs", type=Path, default=Path("runs/frameworks"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{time.strftime('%Y-%m-%d')}-side-by-side.json")
    options = parser.parse_args()
    results = json.loads(options.out.read_text(encoding="utf-8"))["runs"] if options.out.exists() else {}
    pythons = torch_run.references(options, {RUNS[n][1] for n in options.only})
    for name in options.only:
        folders = profile(name, pythons, options.runs)
        ours, theirs = (breakdown.load(folder) for folder in folders)
        results[name] = {"moejax": described(folders[0], ours.bars), "pytorch": described(folders[1], theirs.bars)}
        draw([ours.bars, theirs.bars, *beside(name)], options.runs / "figures" / name)
        if name == "mixtral-sparse":
            shutil.copy(options.runs / "figures" / name / "moe_kernels.png", ROOT / "docs" / "frameworks")
        print(f"{name}: done, figures in {options.runs / 'figures' / name}", flush=True)
        results = {n: results[n] for n in RUNS if n in results}
        kept.write(options.out, kept.about("make frameworks", device=cpu_name(), runs=results))
    between(HERE / "results" / "frameworks.md", "shares", table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
