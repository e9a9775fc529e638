"""The figure and the table of benchmarks/curves.py: docs/frameworks/curves.png, and what stands between two marks in docs/frameworks.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moejax.errors import UserError


def write(results: dict[str, Any], docs: Path) -> None:
    (docs / "frameworks").mkdir(exist_ok=True)
    figure(results, docs / "frameworks" / "curves.png")
    between(docs / "frameworks.md", "curves", table(results))


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
        "| run | largest relative difference until routing differs | of all steps | routing first differs | control: PyTorch beside "
        "itself | mean loss of the last 50: moejax, PyTorch |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        tie, control = r["routing_differs"], r.get("control")
        where = "never" if tie is None else f"step {tie['step']}, layer {tie['layer']}"
        if tie is not None and tie["explains"]:
            where += f": experts {tie['experts'][0]} and {tie['experts'][1]} of one token are {tie['gap']:.1e} apart"
        elif tie is not None:
            where += ": several tokens"
        mark = " (no claim)" if r["agrees"] is None else "" if r["agrees"] else f" **(outside from step {r['first_step_outside']})**"
        before = "–" if tie is not None and tie["step"] == 1 else f"{r['largest_before_routing_differs']:.1e}"
        means = ", ".join(f"{mean:.4f}" for mean in r["mean_of_last"])
        itself = "–" if control is None else f"{control['largest_relative_difference']:.1e}"
        if control and control["first_step_outside"]:
            itself += f", outside from step {control['first_step_outside']}"
        if control and control["routing_differs_at"]:
            itself += f", routing differs at step {control['routing_differs_at']}"
        lines.append(f"| {name} | {before}{mark} | {r['largest_relative_difference']:.1e} | {where} | {itself} | {means} |")
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
