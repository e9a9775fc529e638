"""Draw README's figure, docs/demo.png, from a finished run of the demo: python docs/make_figures.py runs/demo"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
INK, BLUE, ORANGE, GREY = "#222222", "#2b6cb0", "#dd6b20", "#a0aec0"


def read(run: Path, key: str) -> tuple[list[int], list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pairs = [(line["step"], line[key]) for line in lines if key in line]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def clean(axes: plt.Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def demo(run: Path) -> None:
    """Loss over the steps, and exact match of guessing, base and tuned model."""
    result = json.loads((run / "exact_match.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 2))
    left.plot(*read(run, "loss"), color=GREY, linewidth=1, label="training")
    left.plot(*read(run, "eval_loss"), color=BLUE, marker="o", label="held out")
    left.set(xlabel="step", ylabel="loss per supervised token", yscale="log", title="QLoRA on the bundled Mixtral")
    left.legend(frameon=False)
    names = list(result["accuracy"])
    bars = right.bar(names, [100 * v for v in result["accuracy"].values()], color=[GREY, ORANGE, BLUE])
    right.bar_label(bars, fmt="%.1f %%")
    right.set(ylim=(0, 105), ylabel="exact match, %", title=f"{result['problems']} held-out problems")
    for axes in (left, right):
        clean(axes)
    figure.tight_layout()
    figure.savefig(HERE / "demo.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    demo(parser.parse_args().run)
