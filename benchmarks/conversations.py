"""Conversations read, rendered, masked, tokenized and packed: seconds with start, and the packing's waste.

    python benchmarks/conversations.py [--count 15000] [--out FILE.json]

Lengths are log-normal (median 450 tokens, sigma 0.8, cut at 2048), from one seed; texts are words of the bundled problems, the tokenizer is
the bundled one with a chat template in ChatML's form. The seconds are those of a process of its own, its start included.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SEED, MEDIAN, SIGMA, LONGEST = 7, 450, 0.8, 2048


def write(path: Path, count: int) -> None:
    """This many conversations of one to five answers."""
    problems = json.loads((ROOT / "assets/problems/train.json").read_text(encoding="utf-8"))
    words = " ".join(problem["instruction"] for problem in problems).split()
    per_word = 1.36  # tokens of the bundled tokenizer
    lengths = np.minimum(np.random.default_rng(SEED).lognormal(np.log(MEDIAN), SIGMA, count), LONGEST)
    draw = random.Random(SEED)
    with path.open("w", encoding="utf-8") as file:
        for tokens in lengths:
            turns = draw.randint(1, 5)
            size = max(2, int(tokens / per_word / turns / 2))
            texts = (" ".join(words[(at := draw.randrange(len(words) - size)) : at + size]) for _ in range(2 * turns))
            messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
            file.write(json.dumps({"messages": messages}) + "\n")


def load(path: Path) -> None:
    """In a process of its own: what a run does before its model, and what came of it as JSON."""
    from tokenizers import AddedToken

    from moejax.config import DataConfig
    from moejax.data.chat import CHATML
    from moejax.data.pipeline import load
    from moejax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = CHATML
    config = DataConfig(source=str(path), row_tokens=LONGEST, max_length=LONGEST)
    data = load(config, tokenizer, 0, len(tokenizer))
    lengths = [len(query.ids) for query in data.train.queries]
    rows, best = data.train.rows(), -(-sum(lengths) // LONGEST)
    print(json.dumps({
        "conversations": len(lengths), "median": float(np.median(lengths)), "tokens": sum(lengths),
        "supervised": int(data.statistics()["supervised tokens"]), "rows": rows, "rows_at_least": best, "waste": data.train.waste(),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=15_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "chat.jsonl")
        write(path, options.count)
        start = time.perf_counter()
        child = subprocess.run([sys.executable, __file__, "--load", str(path)], check=True, capture_output=True, text=True)
        result = {"seconds": round(time.perf_counter() - start, 2), "bytes": path.stat().st_size} | json.loads(child.stdout)
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
