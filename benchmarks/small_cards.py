"""Which model trains on which card, compiled: the table of docs/small_cards.md.

    python benchmarks/small_cards.py --out benchmarks/results/<date>-small-cards.jsonl      # goes on where the file ends
    python benchmarks/small_cards.py --out FILE --table                                     # only the table of what is there

For a config and a card: the first of its ways (`CHANGES`) with which a row of at least 512 tokens fits, and with it the longest row, by the
closed form first and then compiled, down until the compiler's peak fits. Needs the extra `aot`; nothing runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import kept

from moejax import config, gpus
from moejax.estimator import closed_form, memory, sizes

ROOT = Path(__file__).parent.parent
CONFIGS = ("mixtral_8x7b", "qwen3_30b_a3b_24gb", "olmoe_1b_7b", "blackmamba_2.8b")
CARDS = ("RTX-4060", "RTX-4070", "RTX-5080", "RTX-4090", "RTX-5090", "A40", "H100")
ONE_ROW = ("data.batch_rows=1", "training.gradient_accumulation=1", "training.remat=full")
CHANGES: tuple[tuple[str, ...], ...] = (
    (), ("training.optimizer=adamw_8bit",), ("placement.experts=host",), ("placement.experts=host", "training.optimizer=adamw_8bit"),
    ("placement.experts=host", "placement.tables=host", "training.optimizer=adamw_8bit"),
    ("placement.experts=host", "placement.tables=host", "training.optimizer=adamw_8bit", "adapter.rank=4"),
)  # fmt: skip
SHORTEST, LONGEST, STEP = 512, 16384, 128


def longest(experiment: config.Experiment, architecture: Any, card: gpus.GPU, limit: float) -> int:
    """Tokens of the longest row within `limit` bytes by the closed form; 0 where none of `SHORTEST` does."""
    low, high = 0, min(LONGEST, architecture.max_position_embeddings) // STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = closed_form.on(card, experiment, architecture, 1, middle * STEP).total <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * STEP if low * STEP >= SHORTEST else 0


def cell(name: str, card: gpus.GPU) -> dict[str, Any]:
    """What is kept of a config on a card."""
    from moejax.training.program import TrainProgram

    for changes in CHANGES:
        experiment = config.load(ROOT / "configs" / f"{name}.yaml", ONE_ROW)
        if experiment.adapter is None and any(not change.startswith("training.") for change in changes):
            continue  # nothing is frozen
        experiment = config.load(ROOT / "configs" / f"{name}.yaml", [*ONE_ROW, *changes])
        architecture = sizes.architecture_of(experiment)
        experiment = experiment.with_defaults(architecture)
        limit = memory.usable_bytes(card, experiment.device.memory_fraction)
        tokens = longest(experiment, architecture, card, limit)
        while tokens >= SHORTEST:
            made = TrainProgram(experiment, architecture, gpu=card).compile(1, tokens)
            if made.peak_bytes <= limit:
                return {
                    "changes": changes, "row_tokens": tokens, "peak_gb": made.peak_bytes / 1e9, "host_gb": made.host_bytes / 1e9,
                    "limit_gb": limit / 1e9, "compile_seconds": made.seconds,
                }  # fmt: skip
            tokens = min(tokens - STEP, int(tokens * limit / made.peak_bytes) // STEP * STEP)
    return {"changes": None}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a model, a column a card. In a cell: tokens, the recipe, GB on the card + GB in the host's memory."""
    cards = [name for name in CARDS if any(line["gpu"] == name for line in lines)]
    found = [f"| | {' | '.join(f'{name} ({gpus.GPUS[name].memory_gb:g} GB)' for name in cards)} |", "|---" * (len(cards) + 1) + "|"]
    for name in CONFIGS:
        cells = []
        for card in cards:
            line = next((one for one in lines if (one["config"], one["gpu"]) == (name, card)), None)
            if line is None or line["changes"] is None:
                cells.append("" if line is None else "-")
                continue
            way = [list(changes) for changes in CHANGES].index(list(line["changes"]))
            host = f" + {line['host_gb']:.1f}" if line["host_gb"] > 0.01 else ""
            cells.append(f"**{line['row_tokens']:,}** ({way}) {line['peak_gb']:.1f}{host}")
        found.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--gpus", default=",".join(CARDS))
    parser.add_argument("--table", action="store_true", help="compile nothing")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if not options.table:
        there = {(line["config"], line["gpu"]) for line in lines}
        with options.out.open("a") as out:
            for name in options.configs.split(","):
                for gpu in options.gpus.split(","):
                    if (name, gpu) in there:
                        continue
                    line = {"config": name, "gpu": gpu} | cell(name, gpus.find(gpu)) | {"versions": kept.about()["versions"]}
                    lines.append(line)
                    print(json.dumps(line), file=out, flush=True)
                    print(name, gpu, line.get("row_tokens"), line["changes"], file=sys.stderr)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
