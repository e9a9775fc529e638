"""Compile configs' steps for GPUs that are not there: the compiler's peak beside the closed form's, FLOPs and bytes of a step.

    python benchmarks/aot_memory.py --config configs/mixtral_8x7b_cs_sparse.yaml --gpu H100 --rows 1,8,32 --seq-len 512
    python benchmarks/aot_memory.py --config configs/mixtral_8x7b_*.yaml configs/blackmamba_2.8b_*.yaml --gpu H100,A100-80 --rows own \\
        --out benchmarks/results/<date>-aot-steps.json
    python benchmarks/aot_memory.py --remat none,dots,full --rows 1,8
    python benchmarks/aot_memory.py --config configs/*.yaml --gpu H100,A100-80,A40 --rows own,8xown

`own`: the config's own rows and their length, `8xown`: eight times as many. closed_form_error: closed form over compiler, less 1. FLOPs,
bytes and launches (kernels, library calls, copies) are counted from the compiled instructions, with uniform routing
(moejax/training/experts.py).

Needs the extra: pip install -e '.[aot]'; JAX_PLATFORMS=cpu is set here.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent))

import kept

from moejax import config, gpus, installation
from moejax.errors import UserError


def compiled(experiment: Any, gpu: str, rows: int, row_tokens: int) -> tuple[dict[str, Any], Any]:
    """One step for one GPU: what is told of it, and the program."""
    from moejax.estimator import closed_form
    from moejax.estimator.sizes import architecture_of
    from moejax.training import experts
    from moejax.training.program import TrainProgram

    sizes, tokens, card = architecture_of(experiment), rows * row_tokens, gpus.find(gpu)
    c = TrainProgram(experiment, sizes, gpu=gpu).compile(rows, row_tokens)
    plan, closed = experts.plan(experiment, sizes, tokens, card), None
    if experiment.training.remat in ("none", "full"):  # what the closed form knows
        closed = closed_form.on(card, experiment, sizes, rows, row_tokens).total
    routing = (plan, experts.uniform_loads(sizes, tokens))
    cost = experts.total(experts.costs(c.executable, *routing))
    return {
        "config": experiment.name, "gpu": gpu, "backend": "dense" if plan is None else plan.backend, "remat": experiment.training.remat,
        "rows": rows, "row_tokens": row_tokens, "peak_gb": round(c.peak_bytes / 1e9, 3),
        "closed_form_gb": None if closed is None else round(closed / 1e9, 3),
        "closed_form_error": None if closed is None else round(closed / c.peak_bytes - 1, 4),
        "arguments_gb": round(c.argument_bytes / 1e9, 3),
        "tflop": round(cost.flops / 1e12, 2), "moved_gb": round(cost.bytes / 1e9, 1),
        "launches": round(experts.launches(c.executable, *routing)), "compile_seconds": round(c.seconds, 1),
    }, c.executable  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["configs/mixtral_8x7b_cs_sparse.yaml"])
    parser.add_argument("--gpu", default="H100", help="comma-separated")
    parser.add_argument("--rows", default="1,8,32", help="comma-separated: numbers, `own`, or `8xown`")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--remat", default=None, help="comma-separated policies; by default the config's own")
    parser.add_argument("--dump", type=Path, help="write the optimized HLO of the last program here")
    parser.add_argument("--out", type=Path, help="JSON of everything, with versions")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_intermixed_args()
    report = kept.about(versions=installation.versions(), steps=[])
    try:
        for path, gpu in itertools.product(options.config, options.gpu.split(",")):
            for remat in options.remat.split(",") if options.remat else [None]:
                chosen = [] if remat is None else [f"training.remat={remat}"]
                experiment = config.load(path, [*options.overrides, *chosen])
                for asked in options.rows.split(","):
                    own = asked.endswith("own")
                    rows = int(asked.removesuffix("own").removesuffix("x") or 1) * (experiment.data.batch_rows if own else 1)
                    length = experiment.data.longest_row if own else options.seq_len
                    told, program = compiled(experiment, gpu, rows, length)
                    print(json.dumps(told), flush=True)
                    report["steps"].append(told)
                    kept.write(options.out, report)
        if options.dump:
            options.dump.write_text(program.as_text())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
