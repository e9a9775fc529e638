"""Greedy decoding of a batch here and by transformers' generate, in turn, on this machine: part of `make bench`.

    python benchmarks/decoding.py [--models NAME …] [--rows 16] [--reference4 PYTHON] [--out FILE.json]

The bundled Mixtral, and random weights of a tiny Qwen3-MoE and OLMoE, in fp32 on both sides; the first problems of
assets/problems/test.json as prompts of different lengths in one batch, 64 tokens each, which nothing ends; prompt and all tokens are timed,
compilation is not. The sides take turns, a batch each; the ratio of the medians is the result, and both must have said the same tokens.
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
from moejax.errors import UserError
from moejax.evaluation.generate import generate
from moejax.hub import save, weights
from moejax.models.build import build
from moejax.models.config import PRESETS

ASSETS = HERE.parent / "assets"
MIXTRAL, PROBLEMS = ASSETS / "tiny-mixtral", ASSETS / "problems/test.json"
MODELS: dict[str, Path | str] = {"mixtral": MIXTRAL, "qwen3_moe": "qwen3-moe-tiny", "olmoe": "olmoe-tiny"}
"""A folder, or a preset of which random weights are drawn. All have the vocabulary of the first."""


def prompts_of(rows: int) -> list[list[int]]:
    tokenizer = load_tokenizer(str(MIXTRAL))
    records = json.loads(PROBLEMS.read_text())[:rows]
    return [tokenizer.encode(render("mistral", record, tokenizer)[0], add_special_tokens=False) for record in records]


def folder_of(name: str, into: Path) -> Path:
    """The model's folder in Hub layout, written if there is none."""
    source = MODELS[name]
    if isinstance(source, Path):
        return source
    save.save_weights(build(PRESETS[source], key=jax.random.key(0), dtype=jnp.float32), into, np.float32)
    return into


def compare(source: Path, reference: Path, rows: int, new: int, rounds: int) -> dict[str, Any]:
    """Seconds of each side's batches, their medians, and the ratio of those."""
    prompts = prompts_of(rows)
    config = weights.read_config(source)
    model = weights.load_weights(build(config, dtype=jnp.float32), source, jax.random.key(0))

    def ours() -> dict[str, Any]:
        start = time.perf_counter()
        tokens = generate(model, prompts, max_new_tokens=new, end=-1, batch_size=rows)
        return {"step_seconds": time.perf_counter() - start, "tokens": tokens}

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.json"
        file.write_text(json.dumps(prompts))
        command = [str(reference), str(HERE / "pytorch" / "generate.py"), str(source), str(file), str(new)]
        with turns.Side(command, {"PYTHONPATH": None}) as torch:
            pairs = [(ours(), torch.step()) for _ in range(rounds + 2)][2:]
            about = torch.about
    seconds = {name: [p[i]["step_seconds"] for p in pairs] for i, name in enumerate(("moejax", "pytorch"))}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "rows": rows,
        "prompt_tokens": [len(p) for p in prompts],
        "new_tokens": new,
        "same_tokens": all(a["tokens"] == b["tokens"] for a, b in pairs),
        "seconds": seconds,
        "median_seconds": medians,
        "tokens_per_second": {name: rows * new / median for name, median in medians.items()},
        "speedup": medians["pytorch"] / medians["moejax"],
        "reference": about,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    torch_run.add_references(parser)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64], help="batches to compare (default: 1 16 64)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        python = torch_run.references(options, ["study"])["study"]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = kept.about("make bench", device=cpu_name(), cases=[])
    print("decoding, tokens/s (fp32)\nmodel      rows   moejax  transformers  times  same tokens")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            source = folder_of(name, Path(folder))
            for rows in options.rows:
                case = {"model": name} | compare(source, python, rows, options.new_tokens, options.rounds)
                rate, same = case["tokens_per_second"], "yes" if case["same_tokens"] else "NO"
                print(f"{name:9} {rows:5} {rate['moejax']:8.0f} {rate['pytorch']:13.0f} {case['speedup']:6.1f}  {same}", flush=True)
                result["cases"].append(case)
    kept.write(options.out, result)
    return 0 if all(case["same_tokens"] for case in result["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
