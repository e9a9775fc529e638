"""The closed form of the peak memory beside the compiler's, for every config of this repository and three GPUs that are not there.

    python benchmarks/memory_check.py --out benchmarks/results/DAY-memory-check.json

Rows as the config has them, and eight times as many. Needs the extra: pip install -e '.[aot]'. Compiled figures are kept in
$MOEJAX_CACHE (or ~/.cache/moejax): a second run takes seconds. Prints a Markdown table; errors are closed form over compiler, less 1.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import kept

from moejax import config, gpus, installation
from moejax.errors import UserError
from moejax.estimator import sizes
from moejax.training import oracle

BAR = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="H100,A100-80,A40")
    parser.add_argument("--config", nargs="*", help="files (default: all of configs/)")
    parser.add_argument("--out", type=Path, help="also as JSON")
    options = parser.parse_args()
    os.chdir(ROOT)
    names = [Path(p) for p in options.config] if options.config else sorted((ROOT / "configs").glob("*.yaml"))
    results = []
    try:
        for path in names:
            for gpu in options.gpu.split(","):
                results += check(path, gpu)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n| config | rows x tokens | GPU | compiler GB | closed form GB | error | moment |\n|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['config']} | {r['rows']} x {r['row_tokens']} | {r['gpu']} | {r['compiler_bytes'] / 1e9:.3f} | "
            f"{r['closed_form_bytes'] / 1e9:.3f} | {100 * r['error']:+.1f} % | {r['moment']} |"
        )
    missed = [r for r in results if abs(r["error"]) > BAR]
    print(f"\n{len(results) - len(missed)} of {len(results)} within {BAR:.0%}")
    kept.write(options.out, kept.about(versions=installation.versions(), results=results))
    return 0


def check(path: Path, gpu: str) -> list[dict[str, object]]:
    """Both figures at the config's rows and at eight times as many."""
    experiment = config.load(path)
    tokens = experiment.data.longest_row
    asked = oracle.oracle(experiment, sizes.architecture_of(experiment), gpus.GPUS[gpu], tokens, False)
    if asked.reason is not None:
        raise UserError(f"{gpu}: {asked.reason}")
    found = []
    for rows in (experiment.data.batch_rows, 8 * experiment.data.batch_rows):
        peak, made = asked.peak_bytes(rows), asked.breakdown(rows)
        found.append(
            {"config": experiment.name, "gpu": gpu, "rows": rows, "row_tokens": tokens, "compiler_bytes": peak,
             "closed_form_bytes": made.total, "error": made.total / peak - 1, "moment": made.moment, "parts": made.parts(peak)}
        )  # fmt: skip
        print(f"{experiment.name} {gpu} {rows}: {100 * (made.total / peak - 1):+.2f} %", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
