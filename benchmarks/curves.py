"""Do the two frameworks learn the same? 200 steps from one initialization on the same batches, here and in PyTorch: `make curves`.

    python benchmarks/curves.py [--steps 200] [--only CASE …] [--reference4 PYTHON] [--reference5 PYTHON]

Writes benchmarks/results/DATE-curves.json, docs/frameworks/curves.png, and the table between the marks in results/frameworks.md. In fp32
losses must agree within 1e-4 (relative) until a token chooses another expert on one side; where that happens the step, the token and the
gap between its two candidates are printed. How far rounding alone drives this training apart, a control says: PyTorch next to itself, one
trained matrix changed by its last bit at the start. In bf16 both curves are shown and nothing is claimed. Threads: one each, unless
OMP_NUM_THREADS says more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import kept
import torch_run

from moejax import config as configuration
from moejax.device import cpu_name
from moejax.errors import UserError

TOLERANCE = 1e-4
TIE = 1e-4
"""Two candidates whose probabilities are nearer than this tie: so far apart both sides' probabilities may lie by then."""
LAST = 50
COMMON = [
    "training.epochs=null", "training.warmup_steps=20", "training.eval_every=null", "checkpoint.every=null", "data.batch_rows=4",
    "data.row_tokens=128", "data.max_length=128",
]  # fmt: skip
LORA = ["quantization.format=none"]
SHARED = [*LORA, "adapter.share=[w1,w3]"]
MAMBA = ("configs/demo_blackmamba.yaml", "plain", ["training.label_smoothing=0.1"])
BF16 = ["training.compute_dtype=bfloat16"]
RANDOM = ["model.source=null", "tokenizer=assets/tiny-mixtral", "adapter.targets=null"]
QWEN3, OLMOE = (["model.preset=qwen3-moe-tiny", *RANDOM], ["model.preset=olmoe-tiny", *RANDOM])
DENSE = [*LORA, "model.experts_per_token=8"]
CASES: dict[str, tuple[str, str, list[str]]] = {
    "mixtral QLoRA fp32": ("configs/demo.yaml", "study", []),
    "mixtral LoRA fp32": ("configs/demo.yaml", "study", LORA),
    "mixtral dense LoRA fp32": ("configs/demo.yaml", "study", DENSE),
    "mixtral dense LoRA fp32, rate / 10": ("configs/demo.yaml", "study", [*DENSE, "training.learning_rate=2.0e-4"]),
    "blackmamba sparse fp32": MAMBA,
    "blackmamba dense fp32": (*MAMBA[:2], [*MAMBA[2], "model.experts_per_token=8"]),
    "mixtral QLoRA bf16": ("configs/demo.yaml", "study", BF16),
    "mixtral LoRA bf16": ("configs/demo.yaml", "study", [*LORA, *BF16]),
    "blackmamba sparse bf16": (*MAMBA[:2], [*MAMBA[2], *BF16]),
    "qwen3_moe QLoRA fp32": ("configs/demo.yaml", "study", QWEN3),
    "qwen3_moe LoRA fp32": ("configs/demo.yaml", "study", [*QWEN3, *LORA]),
    "qwen3_moe LoRA fp32, shared A": ("configs/demo.yaml", "today", [*QWEN3, *SHARED]),
    "olmoe QLoRA fp32": ("configs/demo.yaml", "study", OLMOE),
    "olmoe LoRA fp32": ("configs/demo.yaml", "study", [*OLMOE, *LORA]),
    "olmoe LoRA fp32, shared A": ("configs/demo.yaml", "today", [*OLMOE, *SHARED]),
}
"""Name: config, stack, overrides. NF4 codes are the same on both sides and stand for the same values; PyTorch's side holds those."""


def run_case(name: str, steps: int, python: Path, folder: Path) -> dict[str, Any]:
    """Both sides of one case, one after the other."""
    config, stack, overrides = CASES[name]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())
    overrides = [*COMMON, *overrides, f"training.steps={steps}", f"name={slug}", f"runs_dir={folder}"]
    experiment = configuration.load(ROOT / config, overrides)
    torch_folder = folder / f"{slug}-{stack}"
    torch_run.run(experiment, stack, torch_folder, python)
    claimed = not name.endswith("bf16")
    if claimed:
        torch_run.train(torch_folder / "handover", stack, torch_folder / "control", python, ["--nudge"])
    torch_run.moejax(["train", config, *overrides], folder / slug)
    ours, theirs = records(folder / slug), records(torch_folder)
    versions = json.loads((torch_folder / "versions.json").read_text(encoding="utf-8"))
    about = {"config": config, "stack": stack, "overrides": overrides[:-2], "versions": versions}
    result = about | compare(ours, theirs, claimed=claimed)
    if claimed:
        control = compare(records(torch_folder / "control"), theirs, claimed=True)
        names = ("largest_relative_difference", "first_step_outside")
        split = control["routing_differs"]
        result["control"] = {n: control[n] for n in names} | {"routing_differs_at": split and split["step"]}
    return result


def records(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run's metrics.jsonl."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [r for r in lines if "loss" in r]


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], *, claimed: bool) -> dict[str, Any]:
    """Losses step by step; the first step whose routing differs, with the token nearest to a tie in the layer where it does; whether
    the claim holds: within TOLERANCE until a tie, and a tie it is (None: no claim is made)."""
    if [r["step"] for r in ours] != [r["step"] for r in theirs]:
        raise UserError(f"the two sides have {len(ours)} and {len(theirs)} steps")
    for a, b in zip(ours, theirs, strict=True):
        for field in ("queries", "real_tokens", "supervised_tokens"):
            if a[field] != b[field]:
                raise UserError(f"step {a['step']}: {field} = {a[field]} here, {b[field]} in PyTorch: not the same batches")
    relative = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    split = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a["expert_counts"] != b["expert_counts"]), None
    )
    outside = next((i for i, r in enumerate(relative) if r > TOLERANCE), None)
    before = relative[: split if split is not None else len(relative)]
    tie = None if split is None else _tie(ours[split], theirs[split])
    holds = max(before, default=0.0) <= TOLERANCE and (tie is None or (tie["explains"] and tie["gap"] <= TIE))
    return {
        "steps": len(ours),
        "moejax": [_short(r["loss"]) for r in ours],
        "pytorch": [_short(r["loss"]) for r in theirs],
        "largest_relative_difference": max(relative),
        "largest_before_routing_differs": max(before, default=0.0),
        "mean_of_last": [fmean(r["loss"] for r in side[-LAST:]) for side in (ours, theirs)],
        "largest_expert_share": [fmean(_largest_share(r["expert_counts"]) for r in side) for side in (ours, theirs)],
        "first_step_outside": None if outside is None else ours[outside]["step"],
        "routing_differs": tie,
        "agrees": holds if claimed else None,
    }


def _short(loss: float) -> float:
    """An fp32 number has no more digits."""
    return float(f"{loss:.8g}")


def _largest_share(counts: list[list[float]]) -> float:
    """The most loaded expert's share of its layer's choices, mean over layers."""
    return fmean(max(layer) / sum(layer) for layer in counts)


def _tie(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The first layer whose counts differ, and its token nearest to another choice."""
    layer = next(i for i, (x, y) in enumerate(zip(a["expert_counts"], b["expert_counts"], strict=True)) if x != y)
    moved = [x - y for x, y in zip(a["expert_counts"][layer], b["expert_counts"][layer], strict=True)]
    nearest = b["nearest_ties"][layer]
    found: dict[str, Any] = {"step": a["step"], "layer": layer, "counts_here_minus_pytorch": moved, "explains": False}
    if nearest is not None:
        gap, (micro, row, position), experts = nearest
        found |= {"gap": gap, "micro_batch": micro, "row": row, "position": position, "experts": experts}
        found["explains"] = {e for e, n in enumerate(moved) if n} == set(experts)
    return found


def say(name: str, result: dict[str, Any]) -> str:
    """One line on a case."""
    text = f"{name}: largest difference {result['largest_relative_difference']:.1e}"
    tie = result["routing_differs"]
    if tie is None:
        return f"{text}, every expert chosen equally often at all {result['steps']} steps"
    text += f"; up to step {tie['step'] - 1} {result['largest_before_routing_differs']:.1e}; "
    text += f"at step {tie['step']} layer {tie['layer']} routes "
    if not tie["explains"]:
        return f"{text}several tokens otherwise"
    return (
        f"{text}the token at row {tie['row']}, position {tie['position']} otherwise: its experts {tie['experts'][0]} and "
        f"{tie['experts'][1]} are {tie['gap']:.1e} apart"
    )


def between(page: Path, name: str, text: str) -> None:
    """Put `text` between the page's two marks of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = page.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise UserError(f"{page} has no marks {begin} and {end}: the table belongs between them")
    before, rest = content.split(begin)
    page.write_text(f"{before}{begin}\n{text}{end}{rest.split(end)[1]}", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    lines = [
        "| run | largest relative difference until routing differs | routing differs from step | control: largest difference, step "
        "outside, step of other routing | mean loss of the last 50: moejax, PyTorch |",
        "|---|---|---|---|---|",
    ]
    for name, r in results.items():
        if r["agrees"] is None:  # bf16: nothing is claimed
            continue
        tie, control = r["routing_differs"], r.get("control")
        mark = "" if r["agrees"] else f" **(outside from step {r['first_step_outside']})**"
        before = "–" if tie is not None and tie["step"] == 1 else f"{r['largest_before_routing_differs']:.1e}"
        means = ", ".join(f"{mean:.4f}" for mean in r["mean_of_last"])
        itself = "–"
        if control:
            steps = (control["first_step_outside"] or "never", control["routing_differs_at"] or "never")
            itself = f"{control['largest_relative_difference']:.1e}, {steps[0]}, {steps[1]}"
        lines.append(f"| {name} | {before}{mark} | {'never' if tie is None else tie['step']} | {itself} | {means} |")
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Any], path: Path) -> None:
    """Above both losses, below their relative difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = min(len(results), 5)
    bands = -(-len(results) // columns)
    drawing = Figure(figsize=(3.1 * columns, 5.2 * bands), layout="constrained")
    panels = drawing.subplots(2 * bands, columns, squeeze=False, sharex=True, height_ratios=(1.3, 1) * bands)
    for empty in panels[-2:, len(results) - columns * (bands - 1) :].flat:
        empty.set_axis_off()
    for number, (name, r) in enumerate(results.items()):
        band, column = divmod(number, columns)
        upper, lower = panels[2 * band][column], panels[2 * band + 1][column]
        steps = range(1, r["steps"] + 1)
        upper.plot(steps, r["pytorch"], color="#d9822b", linewidth=2.6, alpha=0.6, label="PyTorch")
        upper.plot(steps, r["moejax"], color="#1f4e8c", linewidth=0.9, label="moejax")
        upper.set_title(name, fontsize=9)
        relative = [max(abs(a - b) / abs(b), 1e-9) for a, b in zip(r["moejax"], r["pytorch"], strict=True)]
        lower.semilogy(steps, relative, color="#444444", linewidth=0.8)
        lower.set_ylim(1e-9, 1)
        if r["agrees"] is not None:
            lower.axhline(1e-4, color="#b03030", linewidth=0.8, linestyle="--")
        if r["routing_differs"] is not None:
            lower.axvline(r["routing_differs"]["step"], color="#2a8a4a", linewidth=0.9, linestyle=":")
        lower.set_xlabel("step", fontsize=8)
        lower.tick_params(labelbottom=True)
        for axes in (upper, lower):
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("loss", fontsize=8)
    panels[1][0].set_ylabel("relative difference\n(dashed: 1e-4; dotted: routing differs)", fontsize=8)
    panels[0][0].legend(fontsize=7, frameon=False)
    drawing.savefig(path, dpi=130)


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    torch_run.add_references(parser)
    parser.add_argument("--runs", type=Path, default=Path("runs/curves"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{time.strftime('%Y-%m-%d')}-curves.json")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pythons = torch_run.references(options, {CASES[name][1] for name in options.only})
    results = json.loads(options.out.read_text())["cases"] if options.out.exists() else {}
    for name in options.only:
        results[name] = run_case(name, options.steps, pythons[CASES[name][1]], options.runs)
        print(say(name, results[name]), flush=True)
        ordered = {name: results[name] for name in CASES if name in results}
        report = kept.about("make curves", device=cpu_name(), tolerance=TOLERANCE, cases=ordered)
        options.out.write_text(json.dumps(report, separators=(",", ":")) + "\n", encoding="utf-8")
    figure(results, ROOT / "docs" / "frameworks" / "curves.png")
    between(HERE / "results" / "frameworks.md", "curves", table(results))
    # What parts although PyTorch stays next to itself is no rounding.
    return int(any(r["agrees"] is False and r["control"]["first_step_outside"] is None for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
