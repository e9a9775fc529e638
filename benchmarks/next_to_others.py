"""Peak memory of published recipes of other tools, and of the same recipes here, compiled: README's table and picture.

    python benchmarks/next_to_others.py --out benchmarks/results/<date>-next-to-others.json [--draw docs/memory.png]
    python benchmarks/next_to_others.py --out FILE --draw docs/memory.png --table           # of what FILE holds

The others' figures are their authors' own, measured on a card (torch's max_memory_allocated); ours are the compiler's peak of the whole
step for that card, which was not there. Needs the extra `aot`; nothing runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import kept

ROOT = Path(__file__).parent.parent
BOTH = "adapter.targets=[q_proj,k_proj,v_proj,o_proj,w1,w2,w3]"
EIGHT_BIT = ("training.optimizer=adamw_8bit", "training.gradient_accumulation=4", "data.batch_rows=2", "training.remat=full")
QWEN3 = (*EIGHT_BIT, "adapter.rank=16", "adapter.alpha=32", "adapter.share=[w1,w3]")
HOST, TABLES = "placement.experts=host", "placement.tables=host"
RECEIPTS = "github.com/pjordanandrsn/experts4bit-qlora, its receipts of 2026"


@dataclass(frozen=True)
class Recipe:
    """What others published and what is compiled here: `rows` x `row_tokens` are one micro-batch; peaks in GB (1e9 bytes)."""

    title: str
    gpu: str
    config: str
    changes: tuple[str, ...]
    rows: int
    row_tokens: int
    published: dict[str, float]


RECIPES = (
    Recipe(
        "Mixtral-8x7B, rank 16, 4 x 2 rows of at most 711", "RTX-5090", "mixtral_8x7b", (BOTH, *EIGHT_BIT), 2, 720,
        {"Unsloth 2026.9.14": 29.13, "experts4bit-qlora 0.46": 29.03},
    ),
    Recipe(
        "the same, experts in host memory", "RTX-5090", "mixtral_8x7b", (BOTH, *EIGHT_BIT, HOST), 2, 720,
        {"experts4bit-qlora": 7.15},
    ),
    Recipe(
        "Mixtral-8x7B, rank 8, a row of 100, host memory", "RTX-5090", "mixtral_8x7b",
        (BOTH, "adapter.rank=8", "adapter.alpha=16", "training.remat=full", HOST, TABLES), 1, 112,
        {"experts4bit-qlora 0.35": 3.22},
    ),
    Recipe(
        "Qwen3-30B-A3B, rank 16, 4 x 2 rows (ours of 512)", "RTX-5090", "qwen3_30b_a3b_24gb", QWEN3, 2, 512,
        {"Unsloth 2026.9.14": 24.27, "experts4bit-qlora 0.49": 26.16},
    ),
    Recipe(
        "the same, experts in host memory", "RTX-4090", "qwen3_30b_a3b_24gb", (*QWEN3, HOST), 2, 512,
        {"experts4bit-qlora": 11.88},
    ),
    Recipe(
        "OLMoE-1B-7B, rank 16, 4 x 2 rows (ours of 512)", "RTX-5090", "olmoe_1b_7b", EIGHT_BIT, 2, 512,
        {"Unsloth": 5.97, "experts4bit-qlora": 8.18, "transformers, bf16": 16.32},
    ),
)  # fmt: skip
"""Others' rows of Qwen3 and OLMoE are alpaca's: 190 tokens in the mean, padded to the longest of a micro-batch."""


def compiled(recipe: Recipe) -> dict[str, Any]:
    """The recipe, and what its step takes here."""
    from moejax import config, gpus
    from moejax.estimator import sizes
    from moejax.training.program import TrainProgram

    experiment = config.load(ROOT / "configs" / f"{recipe.config}.yaml", recipe.changes)
    architecture = sizes.architecture_of(experiment)
    program = TrainProgram(experiment.with_defaults(architecture), architecture, gpu=gpus.find(recipe.gpu))
    made = program.compile(recipe.rows, recipe.row_tokens)
    return asdict(recipe) | {"peak_gb": made.peak_bytes / 1e9, "host_gb": made.host_bytes / 1e9}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a recipe a line."""
    lines = ["| recipe | card | others, measured by themselves | moejax, compiled |", "|---|---|---|---|"]
    for one in found:
        others = ", ".join(f"{name} {gb:.1f}" for name, gb in one["published"].items())
        host = f" + {one['host_gb']:.1f} of host memory" if one["host_gb"] > 0.01 else ""
        lines.append(f"| {one['title']} | {one['gpu']} | {others} | **{one['peak_gb']:.1f} GB**{host} |")
    return "\n".join(lines)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Bars of one length scale, ours hatched: compiled, not measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.6))
    place, ticks = 0.0, []
    for one in found:
        bars = [*one["published"].items(), ("moejax, compiled", one["peak_gb"])]
        ticks.append((place + (len(bars) - 1) / 2, f"{one['title']}\n{one['gpu']}"))
        for name, gb in bars:
            ours = name.startswith("moejax")
            bar = {"color": "white", "edgecolor": "#2b6cb0", "hatch": "////"} if ours else {"color": "#a0aec0"}
            axes.barh(place, gb, height=0.86, **bar)
            text = {"color": "#2b6cb0", "fontweight": "bold"} if ours else {"color": "#222222"}
            axes.annotate(f"{gb:.1f}  {name}", (gb, place), (4, 0), textcoords="offset points", va="center", fontsize=8, **text)
            place += 1
        place += 0.7
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 42), xlabel="peak memory of the card, GB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--draw", type=Path, metavar="FILE.png")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    options = parser.parse_args()
    if options.table:
        found = json.loads(options.out.read_text())["recipes"]
    else:
        found = [compiled(recipe) for recipe in RECIPES]
        kept.write(options.out, kept.about(source=RECEIPTS, recipes=found))
    if options.draw:
        draw(found, options.draw)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
