"""Greedy decoding here and by transformers' generate, in turn, on this machine's CPU.

    python benchmarks/decoding.py [--rows 1 16 64] [--reference4 PYTHON] [--out FILE.json]

First as `moejax chat` decodes: one prompt, in pieces. Then by `generate`, for each number of rows.

The bundled Mixtral in fp32 on both sides, the first problems of assets/problems/test.json as prompts of one batch, 64 tokens each, which
nothing ends; prompts and all tokens are timed, compilation is not. The ratio of the medians is the result; both must say the same tokens.
The ratio of the processors' seconds stands next to it: on a machine that does other things too it is the one to trust.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import jax
import jax.numpy as jnp
import kept
import numpy as np
import torch_run
import turns

from moejax.data.templates import render
from moejax.data.tokenizer import load_tokenizer
from moejax.device import cpu_name
from moejax.evaluation.dialogue import Held
from moejax.evaluation.generate import Sampling, generate
from moejax.hub import weights
from moejax.models.build import Model, build

MODEL, PROBLEMS = HERE.parent / "assets/tiny-mixtral", HERE.parent / "assets/problems/test.json"
NEW, ROUNDS, WARM_UP = 64, 7, 2


def compare(model: Model, reference: Path, rows: int, by: str) -> dict[str, Any]:
    """Seconds of each side's batches, their medians, and the ratio of those. by: "generate", or "chat", which has one row."""
    tokenizer = load_tokenizer(str(MODEL))
    records = json.loads(PROBLEMS.read_text())[:rows]
    prompts = [tokenizer.encode(render("mistral", record, tokenizer)[0], add_special_tokens=False) for record in records]

    held = Held(model)

    def ours() -> dict[str, Any]:
        start, cpu = time.perf_counter(), time.process_time()
        if by == "chat":
            held.ids = []  # each is a first message
            tokens = [np.concatenate(list(held.answer(prompts[0], NEW, -1, Sampling()))).tolist()]
        else:
            tokens = generate(model, prompts, max_new_tokens=NEW, end=-1, batch_size=rows)
        return {"step_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "tokens": tokens}

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.json"
        file.write_text(json.dumps(prompts))
        command = [str(reference), str(HERE / "pytorch/generate.py"), str(MODEL), str(file), str(NEW)]
        with turns.Side(command, {"PYTHONPATH": None}) as torch:
            pairs = [(ours(), torch.step()) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
            about = torch.about
    sides = {name: [pair[i] for pair in pairs] for i, name in enumerate(("moejax", "pytorch"))}
    seconds, cpu = ({name: [turn[key] for turn in turns_of] for name, turns_of in sides.items()} for key in ("step_seconds", "cpu_seconds"))
    medians, of_cpu = ({name: statistics.median(values) for name, values in each.items()} for each in (seconds, cpu))
    return {
        "by": by, "rows": rows, "prompt_tokens": sum(map(len, prompts)), "new_tokens": NEW, "seconds": seconds, "cpu_seconds": cpu,
        "tokens_per_second": {name: rows * NEW / median for name, median in medians.items()},
        "ratio": medians["pytorch"] / medians["moejax"], "cpu_ratio": of_cpu["pytorch"] / of_cpu["moejax"],
        "same_tokens": all(list(map(list, ours["tokens"])) == theirs["tokens"] for ours, theirs in pairs), "reference": about,
    }  # fmt: skip


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64], help="batches to compare")
    torch_run.add_references(parser)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    python = torch_run.references(options, ["study"])["study"]
    command = f"python benchmarks/decoding.py --rows {' '.join(map(str, options.rows))}"
    result = kept.about(command, device=cpu_name(), cores=len(os.sched_getaffinity(0)), load=os.getloadavg()[0], cases=[])
    model = weights.load_weights(build(weights.read_config(MODEL), dtype=jnp.float32), MODEL, jax.random.key(0))
    print("decoding, tokens/s (fp32)\nby        rows   moejax  transformers  times  by CPU seconds  same tokens")
    for by, rows in [("chat", 1), *(("generate", rows) for rows in options.rows)]:
        case = compare(model, python, rows, by)
        rate = case["tokens_per_second"]
        same = "yes" if case["same_tokens"] else "NO"
        speeds = f"{rate['moejax']:8.0f} {rate['pytorch']:13.0f} {case['ratio']:6.1f} {case['cpu_ratio']:15.1f}"
        print(f"{by:8} {rows:5} {speeds}  {same}", flush=True)
        result["cases"].append(case)
    kept.write(options.out, result)
    return 0 if all(case["same_tokens"] for case in result["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
