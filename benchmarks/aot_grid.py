"""Compile every distinct program of configs/ for GPUs that are not there: what fails, and each peak. `make aot`.

    python benchmarks/aot_grid.py --out benchmarks/results/<date>-aot-grid.jsonl            # goes on where the file ends
    python benchmarks/aot_grid.py --out FILE --table                                        # only the table of what is there
    python benchmarks/aot_grid.py --out FILE --every                                        # at many shapes: hours

By default each published model's config as it is, at its own rows, on `CARDS` and on the card that it is for; the study's models at the
study's largest batches on its GPUs; the small models on one card. --every: all of `GPUS`, see `grid`.

Each result is a line, written at once: program (the first config that has it), gpu, rows, row_tokens, layers, peak_gb or error, seconds,
commit, versions, `sources` (a hash of what the step is made of). What other sources or versions made is compiled again. A process of its
own compiles for one program and GPU: where the compiler aborts, the line says so and the rest goes on. At other rows than the config's own
programs are compiled with two layers (they are scanned), and LLVM and ptxas do not optimize: a quarter less time, the same passes of XLA.
Needs the extra `aot`. Nothing runs.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

CARDS = ("H100", "L4", "RTX-5090")
OWN = (*CARDS, "RTX-4060", "RTX-4070", "RTX-5080", "A40")
"""Of each size one: the card that a config is for."""
GPUS = ("H100", "L4", "A100-80", "A40", "RTX-5090")
ROWS, LENGTHS = (2, 1, 8), (368, 128, 720, 528, 1040, 2048)  # most of them odd multiples of 16: the least that batching allows
WHOLE = ("H100", "L4")
DEPTH = 2
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_gpu_disable_gpuasm_optimizations=true"
_NOT_IN_THE_PROGRAM = ("learning_rate", "warmup_steps", "min_learning_rate_ratio", "steps", "epochs", "eps", "betas")  # or as numbers only
Cell = tuple[int, int, int]  # rows, tokens of a row, layers


def programs() -> dict[str, list[str]]:
    """Configs by the first of those that compile to the same instructions; the real models before the small ones, the largest first."""
    from moejax import config
    from moejax.estimator import memory, sizes

    found: dict[str, list[str]] = {}
    loaded = {path.stem: config.load(path) for path in (ROOT / "configs").glob("*.yaml")}
    of = {name: sizes.architecture_of(experiment) for name, experiment in loaded.items()}
    for name in sorted(loaded, key=lambda n: (not real(n), "dense" in n, -of[n].parameters[0], n)):
        experiment = loaded[name]
        part = memory.relevant(experiment)
        part["training"] |= {"remat": "full"} if settled(name) else {}
        part["training"] = {k: v for k, v in part["training"].items() if k not in _NOT_IN_THE_PROGRAM}
        part["training"]["weight_decay"] = bool(part["training"]["weight_decay"])
        found.setdefault(json.dumps([part, repr(of[name])]), []).append(name)
    return {same[0]: same for same in found.values()}


def settled(name: str) -> list[str]:
    """`remat: auto` as what it comes down to on a full card."""
    from moejax import config

    return ["training.remat=full"] if config.load(ROOT / "configs" / f"{name}.yaml").training.remat == "auto" else []


def real(name: str) -> bool:
    """Whether it is one of the study's models, and none of the small ones."""
    return "8x7b" in name or "2.8b" in name


def published(name: str) -> bool:
    """Whether it is a published model's config: more than a billion parameters."""
    from moejax import config
    from moejax.estimator import sizes

    return sizes.architecture_of(config.load(ROOT / "configs" / f"{name}.yaml")).parameters[0] > 1e9


def own_shape(name: str) -> Cell:
    from moejax import config
    from moejax.estimator import sizes

    experiment = config.load(ROOT / "configs" / f"{name}.yaml")
    return experiment.data.batch_rows, experiment.data.longest_row, sizes.architecture_of(experiment).num_layers


def chosen(same: list[str]) -> dict[str, list[Cell]]:
    """GPU -> what is compiled of a program by default; same: the configs that are it."""
    from moejax import gpus
    from moejax.study.cost import table_3

    name, own = same[0], own_shape(same[0])
    if not published(name):
        return {CARDS[0]: [own]}
    found: dict[str, list[Cell]] = {gpu: [] for gpu in CARDS}
    said = re.search(r"card of (\d+) GB", (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    if said:
        found.setdefault(next(gpu for gpu in OWN if gpus.GPUS[gpu].memory_gb == int(said[1])), [])
    for gpu in found:
        found[gpu].append(own)
    for cell in table_3.study_cells():
        if cell.study is not None and cell.config in same:
            found.setdefault(cell.gpu, []).insert(0, (cell.study, cell.row_tokens, DEPTH))
    return found


def grid(name: str, gpu: str) -> list[Cell]:
    """Of --every: two layers at some shapes, and last the config's own shape. The study's models have every number of rows with every
    length on `WHOLE`; on the other GPUs every length with one number of rows, another on each GPU; other published models three shapes,
    and small ones one."""
    from moejax import config
    from moejax.estimator import sizes

    most = sizes.architecture_of(config.load(ROOT / "configs" / f"{name}.yaml")).max_position_embeddings
    place = GPUS.index(gpu)
    shapes = [(ROWS[(place + number) % len(ROWS)], length) for number, length in enumerate(LENGTHS)]
    if real(name):
        shapes = list(itertools.product(ROWS, LENGTHS)) if gpu in WHOLE else shapes
    else:
        shapes = shapes[:3] if published(name) else shapes[place % len(shapes) :][:1]
    own = own_shape(name)
    return [*((r, n, min(DEPTH, own[2])) for r, n in shapes if n <= most), own]


def worker(name: str, gpu: str, asked: list[Cell]) -> None:
    """Compile each cell, and print a line before and after it."""
    from moejax import config
    from moejax.errors import UserError
    from moejax.estimator import sizes
    from moejax.training.program import TrainProgram

    for rows, row_tokens, layers in asked:
        print(json.dumps({"begins": [rows, row_tokens, layers]}), flush=True)
        experiment = config.load(ROOT / "configs" / f"{name}.yaml", [f"model.overrides.num_layers={layers}", *settled(name)])
        start, outcome = time.perf_counter(), {}
        try:
            compiled = TrainProgram(experiment, sizes.architecture_of(experiment), gpu=gpu).compile(rows, row_tokens)
            outcome = {"peak_gb": round(compiled.peak_bytes / 1e9, 3)}
        except UserError as error:
            outcome = {"error": str(error)}
        told = {"rows": rows, "row_tokens": row_tokens, "layers": layers} | outcome | {"seconds": round(time.perf_counter() - start, 1)}
        print(json.dumps(told), flush=True)


def compiled(name: str, gpu: str, asked: list[Cell], flags: str) -> Iterator[dict[str, Any]]:
    """A process with XLA's flags compiles them; where it dies, what it was at has failed and a next one goes on."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": flags}
    while asked:
        command = [sys.executable, __file__, "--worker", name, gpu, json.dumps(asked)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            at: Cell | None = None
            for line in process.stdout:
                told = json.loads(line)
                if "begins" in told:
                    at = tuple(told["begins"])
                else:
                    at, asked = None, asked[1:]
                    yield told
        if process.returncode == 0:
            return
        if at is None:
            raise SystemExit(f"{name} for {gpu} ended with {process.returncode}: see what `{' '.join(command)}` says")
        died = {"error": f"the compiler ended the process ({process.returncode})"}
        yield dict(zip(("rows", "row_tokens", "layers"), at, strict=True)) | died
        asked = asked[1:]


def told_before(path: Path, same: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(x["program"], x["gpu"], x["rows"], x["row_tokens"], x["layers"]): x for x in lines if same.items() <= x.items()}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: by program and GPU, how many of the shapes compile, and the peak of the config's own shape in full depth."""
    gpus = list(dict.fromkeys(x["gpu"] for x in lines))
    out = [f"| program | {' | '.join(gpus)} |", "|---" * (len(gpus) + 1) + "|"]
    for program in dict.fromkeys(x["program"] for x in lines):
        row = []
        for gpu in gpus:
            here = [x for x in lines if (x["program"], x["gpu"]) == (program, gpu)]
            good = [x for x in here if "error" not in x]
            own = [x for x in good if x["layers"] > DEPTH]
            told = f"{len(good)} of {len(here)}" if here else ""
            row.append(told + "".join(f", {x['rows']} x {x['row_tokens']}: {x['peak_gb']:.1f} GB" for x in own))
        out.append(f"| {program} | {' | '.join(row)} |")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-aot-grid.jsonl")
    parser.add_argument("--programs", help="comma-separated; default: all")
    parser.add_argument("--gpu", help="comma-separated; default: all that are compiled for")
    parser.add_argument("--every", action="store_true", help="at many shapes: hours")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, gpu, asked = options.worker
        worker(name, gpu, json.loads(asked))
        return 0

    from moejax import installation
    from moejax.training import oracle

    same = {"versions": installation.versions(), "sources": oracle._sources()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    known = told_before(options.out, {} if options.table else same)
    asked = {} if options.table else {k: v for k, v in programs().items() if not options.programs or k in options.programs.split(",")}
    work = [
        (name, gpu, cells)
        for name, same_program in asked.items()
        for gpu, cells in ({gpu: grid(name, gpu) for gpu in GPUS} if options.every else chosen(same_program)).items()
        if not options.gpu or gpu in options.gpu.split(",")
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        for name, gpu, cells in sorted(work, key=lambda part: not real(part[0])):
            open_cells = [cell for cell in cells if (name, gpu, *cell) not in known]
            shallow, deep = ([cell for cell in open_cells if (cell[2] <= DEPTH) == few] for few in (True, False))
            for now, flags in ((deep, ""), (shallow, UNOPTIMIZED)):
                for told in compiled(name, gpu, now, flags):
                    line = {"program": name, "configs": asked[name], "gpu": gpu} | told | {"commit": commit} | same
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    known[name, gpu, told["rows"], told["row_tokens"], told["layers"]] = line
                    print(json.dumps({k: v for k, v in line.items() if k not in ("configs", "versions", "sources")}), flush=True)
    print(table(list(known.values())))
    failed = [x for x in known.values() if "error" in x]
    for x in failed:
        shape = f"{x['rows']} x {x['row_tokens']}, {x['layers']} layers"
        print(f"failed: {x['program']} for {x['gpu']}, {shape}: {x['error']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
