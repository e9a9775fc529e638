"""Compile a config's step for GPUs that are not there, and print the compiler's peak by rows.

    python benchmarks/aot_memory.py --config configs/mixtral_8x7b_cs_sparse.yaml --gpu H100 --rows 1,8,32 --row-tokens 512

Needs the extra: pip install -e '.[aot]'; JAX_PLATFORMS=cpu is set here.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent))

from moejax import config
from moejax.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mixtral_8x7b_cs_sparse.yaml")
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--dump", type=Path, help="write the optimized HLO of the last program here")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    from moejax.training import aot

    try:
        experiment = config.load(options.config, options.overrides)
        architecture = experiment.model.architecture(None)
        for rows in (int(r) for r in options.rows.split(",")):
            c = aot.compile_step(experiment, architecture, rows=rows, row_tokens=options.row_tokens, gpu=options.gpu)
            print(
                json.dumps(
                    {
                        "config": experiment.name,
                        "gpu": options.gpu,
                        "rows": rows,
                        "row_tokens": options.row_tokens,
                        "peak_gb": round(c.peak_bytes / 1e9, 3),
                        "arguments_gb": round(c.argument_bytes / 1e9, 3),
                        "compile_seconds": round(c.compile_seconds, 1),
                    }
                ),
                flush=True,
            )
        if options.dump:
            options.dump.write_text(c.program.as_text())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
