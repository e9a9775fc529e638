"""How long `train.py` takes from the command to the end of its first step, with an empty cache of compiled programs and with a full one.

    python benchmarks/start_time.py [--config configs/demo.yaml] [--rounds 3] [--out FILE.json] [key.sub=value …]

Each round starts it twice, a process of its own each time: cold, with a cache folder that is empty; then warm, with the same folder. The
end of the first step is when its line is in metrics.jsonl. Weights are loaded as the config says; `model.source=null` with the name of
a preset, few layers (`model.overrides.num_layers=2`: they are scanned, so that a step compiles as long), `data.source=null` and
`data.batching=fixed` leave that out.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import kept

from moejax.device import cpu_name
from moejax.errors import UserError

ROOT = Path(__file__).parent.parent
ONE_STEP = ["name=start", "training.steps=1", "training.warmup_steps=0", "training.epochs=null", "training.eval_every=null", "eval=null"]
COMPILING = re.compile(r"([\d.]+) s compiling")
POLL_SECONDS = 0.005


def start(config: str, overrides: list[str], cache: Path) -> dict[str, Any]:
    """One start in a new runs folder: seconds to the end of the first step, and of them the compiler's. Raises UserError where it fails."""
    with tempfile.TemporaryDirectory() as runs, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "train.py", "--config", config, *ONE_STEP, f"runs_dir={runs}", *overrides]
        metrics = Path(runs) / "start" / "metrics.jsonl"
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        )
        seconds = None
        while seconds is None and process.poll() is None:
            if metrics.exists() and metrics.stat().st_size:
                seconds = time.perf_counter() - begun
            time.sleep(POLL_SECONDS)
        code = process.wait()
        said.seek(0)
        text = said.read()
    if code or seconds is None:
        raise UserError(f"{' '.join(command[1:])} ended with {code}: {(text.strip().splitlines() or ['no word'])[-1]}")
    compiling = COMPILING.search(text)
    return {"seconds": seconds, "compile_seconds": float(compiling[1]) if compiling else None}


def summary(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and every start."""
    compiling = [s["compile_seconds"] for s in starts if s["compile_seconds"] is not None]
    return {
        "median_seconds": statistics.median(s["seconds"] for s in starts),
        "median_compile_seconds": statistics.median(compiling) if compiling else None,
        "starts": starts,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="cold and warm starts (default: 3)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    platform, kind = kept.device()
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    try:
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as cache:
                for temperature, done in starts.items():
                    done.append(start(options.config, options.overrides, Path(cache)))
                    print(f"{temperature}: {done[-1]['seconds']:.1f} s", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = kept.about(device=cpu_name() if platform == "cpu" else kind, config=options.config, overrides=options.overrides)
    report |= {temperature: summary(done) for temperature, done in starts.items()}
    kept.write(options.out, report)
    for temperature in starts:
        s = report[temperature]
        compiling = "" if s["median_compile_seconds"] is None else f", {s['median_compile_seconds']:.1f} s of it compiling"
        print(f"{options.config}, {temperature}: {s['median_seconds']:.1f} s to the end of the first step{compiling}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
