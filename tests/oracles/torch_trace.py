# ruff: noqa: E402 (benchmarks/ has to be on the path first)
"""Makes tests/vectors/torch-mixtral.json.gz: one traced step of a tiny Mixtral with adapters in PyTorch, on a CPU.

    PYTHONPATH=. python tests/oracles/torch_trace.py .venv-reference4/bin/python

Runs in moejax's own environment and starts the other. What the reader does not read is left out of the trace.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch_run

from moejax.config import Experiment

OUT = ROOT / "tests" / "vectors" / "torch-mixtral.json.gz"
EXPERIMENT = {
    "name": "trace",
    "model": {"preset": "mixtral-tiny", "overrides": {"num_layers": 2, "num_experts": 4}},
    "adapter": {"rank": 4, "alpha": 8.0, "targets": ["w1", "w2", "w3", "gate", "q_proj", "v_proj"]},
    "data": {"batching": "fixed", "row_tokens": 512, "max_length": 512, "batch_rows": 4},
    "training": {"steps": 6, "compute_dtype": "float32", "schedule": "constant"},
    "profile": {"start_step": 3, "steps": 1},
}
KEPT = ("Sequence number", "External id")


def main():
    with tempfile.TemporaryDirectory() as folder:
        torch_run.run(
            Experiment.model_validate(EXPERIMENT), "study", Path(folder), python=Path(sys.argv[1]), arguments=["--profile"]
        )
        with gzip.open(Path(folder) / "trace.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
    kept = []
    for e in events:
        if e.get("ph") == "X" and e.get("cat") in ("cpu_op", "user_annotation"):
            values = {k: v for k, v in e["args"].items() if k in KEPT}
            kept.append({k: e[k] for k in ("ph", "cat", "name", "tid", "ts", "dur")} | {"args": values})
    with OUT.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        file.write(json.dumps({"traceEvents": kept}, separators=(",", ":")).encode())
    print(f"{OUT}: {len(kept)} events, {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
