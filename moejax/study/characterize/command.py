"""`moejax characterize`: its options, what it does, and what it says meanwhile. What it imports is light: `--help` answers at once."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moejax.errors import UserError
from moejax.progress import duration
from moejax.study.characterize.presets import PRESETS, parse_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from moejax.study.characterize.plan import Task
    from moejax.study.characterize.result import Result
    from moejax.study.report import results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    presets = "; ".join(f"{name}: {p.what}" for name, p in PRESETS.items())
    what = "config files in YAML, and overrides for all of them; sweep.NAME=value changes the sweep"
    parser.add_argument("overrides", nargs="*", default=[], metavar="CONFIG | key.sub=value", help=what)
    parser.add_argument("--config", action="append", default=[], metavar="CONFIG", help="same as CONFIG; may be repeated")
    parser.add_argument("--preset", metavar="NAME", help=f"configs and sizes of the sweep. {presets}")
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; an unfinished sweep continues there")
    parser.add_argument("--plan", action="store_true", help="list the trials with expected durations, then exit")
    parser.add_argument("--memory-limit", metavar="BYTES", help="artificial limit of device memory, e.g. 2GB")
    parser.add_argument("--pretrained", action="store_true", help="download the configs' weights and data sets (default: random ones)")


def run(options: argparse.Namespace) -> int:
    """Plan, run what has not run, write the results. Returns 0; 1 where trials failed; 130 where it was interrupted."""
    from moejax.study.characterize import plan, study
    from moejax.study.characterize.sweep import Sweep, environment
    from moejax.study.report import results
    from moejax.terminal import Console

    options.config = [*options.config, *(text for text in options.overrides if "=" not in text)]
    options.overrides = [text for text in options.overrides if "=" in text]
    console = Console(width=None if sys.stdout.isatty() else 150)
    limit = parse_bytes(options.memory_limit) if options.memory_limit else None
    wanted = study.resolve(options.preset, options.config, options.overrides, limit, options.pretrained)
    env, memory = environment(wanted)
    folder = Path(options.out)
    if options.plan:
        expected = [(t.name, plan.expected(t, wanted, env, memory.bytes or 0)) for t in plan.tasks(wanted)]
        console.print(_table(expected, memory, env))
        return 0
    try:
        sweep = Sweep.open(wanted, folder, options.preset, _command(options), env, memory)
    except OSError as error:
        raise _unwritten(folder, error) from None
    left = duration(sweep.left_seconds(sweep.waiting))
    console.print(f"{len(sweep.waiting)} of {len(sweep.tasks)} trials to run, about {left} (each: --plan)", soft_wrap=True)
    running, count = console.status("starting"), len(sweep.tasks)  # a terminal alone shows it

    def told(task: Task, result: Result | None, left: float) -> None:
        number = sweep.tasks.index(task) + 1
        if result is None:
            running.update(f"{number}/{count} {task.name}, {duration(left)} left")
            return
        text = f"{number:3}/{count} {result.status:13} {task.name}"
        text += "" if result.seconds is None else f"  {result.seconds:.1f} s"
        text += f", {duration(left)} left" + (f"\n          {result.message}" if result.message and result.status != "done" else "")
        console.print(text, soft_wrap=True)

    try:
        with running:
            sweep.run(told)
    except KeyboardInterrupt:
        console.print(f"interrupted: finished trials are in {folder}; the same command continues from there", soft_wrap=True)
        return 130
    except OSError as error:
        raise _unwritten(folder, error) from None
    finally:
        sweep.close()
    failed = [name for name, r in sweep.done.items() if not r.final]
    rows = len(sweep.content.rows)
    console.print(f"{rows} values in {folder / results.CSV_FILE} and {results.JSON_FILE}", soft_wrap=True)
    console.print(f"the page: {shlex.join(['moejax', 'report', str(folder)])}", soft_wrap=True)
    if failed:
        told_ = f"{len(failed)} of {count} trials failed ({', '.join(failed[:3])}{', …' if len(failed) > 3 else ''})"
        why = f"why is in {folder / results.STUDY_FILE} and in {folder / 'logs'}; the same command tries them again"
        print(f"error: {told_}: {why}", file=sys.stderr)
        return 1
    return 0


def _unwritten(folder: Path, error: OSError) -> UserError:
    where = "" if error.filename is None or Path(error.filename) == folder else f"{error.filename}: "
    return UserError(f"--out {folder}: {where}{error.strerror}: expected a folder that can be written (finished trials are kept)")


def _command(options: argparse.Namespace) -> str:
    """The command line as it would be typed."""
    parts = ["moejax", "characterize", *(["--preset", options.preset] if options.preset else [])]
    parts += [part for file in options.config for part in ("--config", file)] + ["--out", options.out]
    parts += ["--memory-limit", options.memory_limit] if options.memory_limit else []
    return shlex.join([*parts, *(["--pretrained"] if options.pretrained else []), *options.overrides])


def _table(expected: list[tuple[str, float]], memory: results.MemoryLimit, env: results.Environment) -> Table:
    """The plan."""
    from rich.table import Table

    of = "artificial limit" if memory.artificial else "of the device"
    table = Table(title=f"{env.device}; {(memory.bytes or 0) / 1e9:.3g} GB ({of})", title_justify="left")
    table.add_column("trial", no_wrap=True)
    table.add_column("expected", justify="right")
    for name, seconds in expected:
        table.add_row(name, duration(seconds))
    table.add_section()
    table.add_row(f"{len(expected)} trials", duration(sum(seconds for _, seconds in expected)))
    return table
