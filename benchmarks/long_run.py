"""10,000 steps of the bundled Mixtral in one process: what grows? Resident memory, bytes written and CPU time, by step.

    python benchmarks/long_run.py [--steps 10000] [--out FILE] [--plot FILE] [--keep FOLDER]

QLoRA on the bundled problems, evaluated and saved every 500 steps; another process reads /proc. Exit code 1 where, after the first 500
steps, resident memory leaves 2 % of what it was then, a file grows by more than BYTES_A_STEP a step, or a step's CPU time by more than
DRIFT. The time is the process's CPU time, the median of a tenth of the run: other programs change it less than they change a clock's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import kept

SETTLED, FLAT, DRIFT = 500, 0.02, 0.10
BYTES_A_STEP = {"metrics.jsonl": 2_000, "events": 5_000}
EVERY = 0.25  # seconds between two looks
_TICK, _PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


def command(steps: int, folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "moejax", "train", "configs/demo.yaml", "name=long_run", f"runs_dir={folder}", f"training.steps={steps}",
        "training.epochs=null", "data.batch_rows=1", "data.row_tokens=64", "data.max_length=64", "data.holdout=20",
        "training.eval_every=500", "checkpoint.every=500",
    ]  # fmt: skip


def watched(process: subprocess.Popen[Any], metrics: Path) -> list[tuple[int, int, float]]:
    """(steps done, resident bytes, CPU seconds of the process) until it ends."""
    found, done, read = [], 0, 0
    while process.poll() is None:
        try:
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * _PAGE
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):  # it ended meanwhile
            break
        if metrics.is_file():
            with metrics.open("rb") as file:
                file.seek(read)
                new = file.read()
            read, done = read + len(new), done + new.count(b'"loss"')
        if resident == 0:  # it is ending
            break
        found.append((done, resident, (int(fields[11]) + int(fields[12])) / _TICK))
        time.sleep(EVERY)
    return found


def sizes(run: Path) -> dict[str, int]:
    """Bytes of what a run writes step by step, and of everything else."""
    files = {path: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    found = {"metrics.jsonl": files.pop(run / "metrics.jsonl")}
    found["events"] = sum(files.pop(path) for path in list(files) if path.name.startswith("events."))
    return found | {"others": sum(files.values())}


def windows(seen: list[tuple[int, int, float]], width: int) -> list[dict[str, float]]:
    """Of each `width` steps: the median and the extremes of resident memory, and a step's CPU time."""
    found = []
    for first in range(0, seen[-1][0] - width + 1, width):
        inside = [one for one in seen if first <= one[0] <= first + width]
        steps, seconds = inside[-1][0] - inside[0][0], inside[-1][2] - inside[0][2]
        resident = [one[1] for one in inside]
        found.append({"step": first + width, "resident_bytes": median(resident), "least_bytes": min(resident),
                      "most_bytes": max(resident), "cpu_ms": 1e3 * seconds / steps})  # fmt: skip
    return found


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["windows"][1:]  # the first one is the start
    steps = [row["step"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
    left.plot(steps, [row["resident_bytes"] / 1e6 for row in rows], color="#2b6cb0")
    left.fill_between(steps, *([row[name] / 1e6 for row in rows] for name in ("least_bytes", "most_bytes")), color="#2b6cb0", alpha=0.2)
    left.set(xlabel="step", ylabel="resident memory, MB", ylim=(0, None))
    right.plot(steps, [row["cpu_ms"] for row in rows], color="#dd6b20")
    right.set(xlabel="step", ylabel="CPU time of a step, ms", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def judged(rows: list[dict[str, float]], written: dict[str, int], steps: int) -> tuple[dict[str, float], list[str]]:
    """(what it came to, what is wrong)."""
    after = [row for row in rows if row["step"] > min(SETTLED, steps // 4)]
    settled = after[0]["resident_bytes"]
    tenth = max(1, len(after) // 10)
    early, late = (median(row["cpu_ms"] for row in part) for part in (after[:tenth], after[-tenth:]))
    found = {
        "memory_growth": max(row["resident_bytes"] for row in after) / settled - 1,
        "memory_loss": 1 - min(row["resident_bytes"] for row in after) / settled, "cpu_drift": late / early - 1,
    }  # fmt: skip
    found |= {f"{name}_bytes_per_step": written[name] / steps for name in BYTES_A_STEP}
    wrong = [f"{name} = {found[name]:.1%}, more than {FLAT:.0%}" for name in ("memory_growth", "memory_loss") if found[name] > FLAT]
    wrong += [f"cpu_drift = {found['cpu_drift']:.1%}, more than {DRIFT:.0%}"] * (found["cpu_drift"] > DRIFT)
    wrong += [
        f"{name}: {found[f'{name}_bytes_per_step']:.0f} bytes a step, more than {limit}"
        for name, limit in BYTES_A_STEP.items() if found[f"{name}_bytes_per_step"] > limit
    ]  # fmt: skip
    return found, wrong


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="write the report here (JSON)")
    parser.add_argument("--plot", type=Path, help="draw it here (.png, .svg)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run in this folder")
    options = parser.parse_args()
    width = 100 if options.steps >= 2_000 else max(1, options.steps // 20)
    with tempfile.TemporaryDirectory(prefix="moejax-long-") as top:
        folder = options.keep or Path(top)
        with subprocess.Popen(command(options.steps, folder.absolute()), cwd=ROOT, stdout=sys.stderr) as process:
            seen = watched(process, folder / "long_run" / "metrics.jsonl")
        if process.returncode:
            print(f"error: the run ended with exit code {process.returncode}", file=sys.stderr)
            return 2
        written = sizes(folder / "long_run")
    rows = windows(seen, width)
    found, wrong = judged(rows, written, options.steps)
    report = kept.about(steps=options.steps, cpus=os.cpu_count(), **found, written_bytes=written, wrong=wrong, windows=rows)
    kept.write(options.out, report)
    if options.plot is not None:
        plot(report, options.plot)
    print(*(f"{name}: {value:.4g}" for name, value in found.items()), *(f"wrong: {one}" for one in wrong), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
