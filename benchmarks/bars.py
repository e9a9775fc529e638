"""What the compiled programs and a card must reach (bars.json), and what they reach.

    python benchmarks/bars.py [--measured FILE]                 # the table: compiled here before, measured by `make gpu-acceptance`
    python benchmarks/bars.py --compile --out benchmarks/results/<date>-bars.json [--only PART]      # goes on where the file ends

A bar is of a program (a config at a shape for a card that need not be there; figures as `gpu_model.py` prints them), or of another result
file. `--compile` needs the extra `aot`: some minutes of two cores a program.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import kept

from moejax import installation
from moejax.errors import UserError

RESULTS = HERE / "results"
CONTENT = json.loads((HERE / "bars.json").read_text(encoding="utf-8"))
PROGRAMS: dict[str, dict[str, Any]] = CONTENT["programs"]
BARS: list[dict[str, Any]] = CONTENT["bars"]
UNITS = {
    "moved_gb": "GB moved", "kernels": "kernels", "graphs": "graph launches", "syncs": "times the host is asked",
    "useful_share": "useful share", "compile_cpu_seconds": "CPU-seconds of compiling (of two cores)", "derived_ms": "ms, derived",
    "peak_gb": "GB, the compiler's peak",
}  # fmt: skip


class Line(NamedTuple):
    """One bar. compiled, measured: None where there is no figure yet."""

    what: str
    limit: str
    compiled: float | None
    measured: float | None
    met: str


def newest(what: str) -> Path | None:
    """`results/<date>-<what>.json` of the latest date."""
    return max(RESULTS.glob(f"*-{what}.json"), default=None)


def compiled(path: Path | None) -> dict[str, dict[str, Any]]:
    return {} if path is None else json.loads(path.read_text(encoding="utf-8"))["programs"]


def measured_of(report: dict[str, Any], step: str, figure: str) -> float | None:
    """Of a step of `gpu_acceptance.py`; None where it did not run. A card that is not the bar's is compared all the same."""
    cases = ((report.get("steps", {}).get(step) or {}).get("report") or {}).get("cases") or [{"error": ""}]
    case = cases[0]
    if "error" in case:
        return None
    peak = case.get("device_peak_bytes")
    return {
        "ms": 1e3 * case["median"], "useful_share": case["useful_share"], "peak_gb": None if peak is None else peak / 1e9,
    }[figure]  # fmt: skip


def lines(found: dict[str, dict[str, Any]], report: dict[str, Any]) -> Iterator[Line]:
    """Every bar. found: `compiled`; report: of `gpu_acceptance.py`."""
    for bar in BARS:
        measured = None
        if "result" in bar:
            file, *keys = bar["result"]
            value: Any = json.loads(path.read_text(encoding="utf-8")) if (path := newest(file)) else None
            for key in keys if value else ():
                value = value[key]
            what = bar["what"]
        else:
            value = found.get(bar["program"], {}).get(bar["figure"])
            what = f"{bar['program']} ({PROGRAMS[bar['program']]['gpu']}): {UNITS[bar['figure']]}"
            if "measured" in bar:
                measured = measured_of(report, **bar["measured"])
        least = "least" in bar
        limit = bar["least" if least else "most"]
        told = value if measured is None else measured  # a card has the last word
        met = "unknown" if told is None else "met" if (told >= limit if least else told <= limit) else "MISSED"
        yield Line(what, f"{'at least' if least else 'at most'} {limit:g}", value, measured, met)


def table(found: list[Line]) -> str:
    """Markdown."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"

    rows = [f"| {b.what} | {b.limit} | {number(b.compiled)} | {number(b.measured)} | {b.met} |" for b in found]
    count = {met: sum(b.met == met for b in found) for met in ("met", "MISSED", "unknown")}
    head = ["| bar | limit | compiled | measured | |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"{count['met']} of {len(found)} met, {count['MISSED']} missed, {count['unknown']} unknown"])


def _cpu_seconds() -> float:
    """Of this process and those that it waited for: on a busy machine they say more than a clock."""
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def compile_all(out: Path, only: str) -> None:
    """Each program that the file does not have, written at once."""
    import gpu_model

    from moejax import config

    report = json.loads(out.read_text(encoding="utf-8")) if out.exists() else kept.about(versions=installation.versions(), programs={})
    for name, program in PROGRAMS.items():
        if name in report["programs"] or only not in name:
            continue
        rows, length = map(int, program["shape"].split("x"))
        overrides = [*kept.of_rows(rows, length), *program["overrides"]]
        experiment = config.load(HERE.parent / "configs" / f"{program['config']}.yaml", overrides)
        before = _cpu_seconds()
        told, _, _ = gpu_model.compiled(experiment, program["gpu"], rows, length)
        report["programs"][name] = program | told | {"compile_cpu_seconds": round(_cpu_seconds() - before, 1)}
        print(f"{name}: {json.dumps(told)}", flush=True)
        kept.write(out, report)


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile what --out does not have")
    parser.add_argument("--only", default="", help="with --compile: programs with this in their name")
    parser.add_argument("--out", type=Path, help="with --compile: JSON")
    parser.add_argument("--measured", type=Path, default=newest("gpu-acceptance"), help="of `make gpu-acceptance`")
    options = parser.parse_args()
    if options.compile:
        if options.out is None:
            raise UserError("--compile without --out: expected a file for what is compiled")
        os.environ["JAX_PLATFORMS"] = "cpu"
        compile_all(options.out, options.only)
    report = {} if options.measured is None else json.loads(options.measured.read_text(encoding="utf-8"))
    print(table(list(lines(compiled(newest("bars")), report))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
