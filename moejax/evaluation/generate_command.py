"""`moejax generate --run RUN --prompt TEXT`: what a finished run's model says, or a model's folder."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.data.ends import Ends
from moejax.data.records import blank, unicode
from moejax.data.tokenize import prompts
from moejax.errors import UserError
from moejax.estimator.units import counted
from moejax.evaluation.generate import Sampling, before, cut, padded_length, stream
from moejax.evaluation.loglikelihood import encoded
from moejax.evaluation.runs import load


def run(options: argparse.Namespace) -> int:
    """Prints the answers (a single one as it comes) to standard output and tokens/s to standard error."""
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    stops = options.stop or []
    if "" in stops:
        raise UserError("--stop '': expected a text to stop at")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: expected at least 1")
    written = options.prompt if options.prompt is not None else options.instruction
    if any(blank(text) for text in written):
        raise UserError("an empty prompt: there is nothing to continue; give --prompt or --instruction a text")
    for name, texts in (("--prompt", options.prompt), ("--instruction", options.instruction), ("--stop", stops)):
        for text in texts or ():
            unicode(name, text)
    make, sizes, tokenizer, template, ends = load(Path(options.run))
    if options.prompt is None:
        if template == "text":
            raise UserError(f"{options.run} was trained with data.template = text, which has no instructions: use --prompt")
        records: list[Any] = [{"instruction": text, "input": "", "output": ""} for text in written]
        _, asked = prompts(records, tokenizer, template, "--instruction")
    else:
        asked = [encoded(tokenizer, text) for text in written]
    padded_length(sizes, asked, options.max_new_tokens)  # before a large model is loaded for nothing
    model = make()
    answers = Answers(tokenizer, stops, len(asked), ends)
    pieces = stream(model, asked, max_new_tokens=options.max_new_tokens, end=ends.ids, sampling=sampling)
    answers.add(next(pieces))
    printed = answers.show(0) if len(asked) == 1 else 0
    start = time.perf_counter()  # the first token is prefill's; everything is compiled by now
    first = answers.count()
    for piece in pieces if not answers.finished() else ():
        answers.add(piece)
        if len(asked) == 1:
            printed = answers.show(printed)
        if answers.finished():
            break
    seconds, count = time.perf_counter() - start, answers.count() - first
    if len(asked) == 1:
        print(answers.text(0)[0][printed:])
    else:
        for row, text in enumerate(written):
            print(f"--- {text}\n{answers.text(row)[0]}")
    if count:
        print(
            f"{counted(count, 'token')} in {seconds:.2f} s: {count / seconds:.1f} tokens/s (decoding, without prefill and compile)",
            file=sys.stderr,
        )
    return 0


class Answers:
    """What has come of each prompt's answer."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompts: int, ends: Ends) -> None:
        self.tokenizer, self.stops, self.ends = tokenizer, [*stops, *([ends.text] if ends.text else [])], ends.ids
        self.tokens: list[list[int]] = [[] for _ in range(prompts)]
        self.ended = [False] * prompts

    def add(self, piece: np.ndarray) -> None:
        for row, tokens in enumerate(piece):
            if not self.ended[row]:
                kept = before(tokens, self.ends)
                self.tokens[row] += kept
                self.ended[row] = len(kept) < len(tokens) or self.text(row)[1]

    def text(self, row: int) -> tuple[str, bool]:
        """An answer up to the first stop string, and whether there was one."""
        return cut(self.tokenizer.decode(self.tokens[row], skip_special_tokens=True), self.stops)

    def finished(self) -> bool:
        return all(self.ended)

    def count(self) -> int:
        return sum(map(len, self.tokens))

    def show(self, printed: int) -> int:
        """Print what of the first answer is new and certain. Returns the number of characters printed so far."""
        text, stopped = self.text(0)
        certain = len(text)
        if not stopped:  # a character of several tokens may be incomplete, and a stop string may have begun
            certain = len(text.rstrip("\ufffd"))
            begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            certain = min(certain, len(text) - max(begun, default=0))
        print(text[printed:certain], end="", flush=True)
        return max(printed, certain)
