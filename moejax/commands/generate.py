"""`moejax generate RUN --prompt TEXT`: generate text with the model of a finished run or of a folder."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.commands.arguments import add_mesh, add_run, check_counts, on_mesh, settle_run
from moejax.errors import UserError, first_line
from moejax.estimator.units import counted
from moejax.runtime import prepare_jax_for

if TYPE_CHECKING:
    from moejax.config_mesh import MeshConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_mesh(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue, without a template; may be repeated")
    asked.add_argument(
        "--instruction", action="append", metavar="TEXT",
        help="instruction to answer, in the run's template; may be repeated",
    )  # fmt: skip
    asked.add_argument(
        "--messages", action="append", metavar="FILE",
        help="JSON file with a conversation to answer: a list of messages or {messages: …, tools: …}; -: standard input",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="maximum length of an answer (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 (default): greedy decoding")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the smallest set of tokens with this total probability")
    parser.add_argument("--top-k", type=int, default=None, help="sample from the K most likely tokens")
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling (default: 0)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="text that ends an answer (not included); may be repeated")


def run(options: argparse.Namespace) -> int:
    """Prints the answers (a single one unchanged) to standard output and tokens/s to standard error."""
    settle_run(options)
    prepare_jax_for(options.run)
    with on_mesh(options) as mesh:
        return _run(options, mesh)


def _run(options: argparse.Namespace, mesh: MeshConfig | None) -> int:
    from moejax import processes
    from moejax.data.records import blank, unicode
    from moejax.data.tokenize import prompts
    from moejax.evaluation.generate import Answers, Sampling, padded_length, stream
    from moejax.evaluation.loglikelihood import encoded
    from moejax.runs.open import load

    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    stops = options.stop or []
    if "" in stops:
        raise UserError("--stop '': expected a text to stop at")
    check_counts(options, "max_new_tokens")
    written = options.prompt or options.instruction or options.messages
    if any(blank(text) for text in written):
        raise UserError("an empty prompt: there is nothing to continue; give --prompt or --instruction a text, or --messages a file")
    for name, texts in (("--prompt", options.prompt), ("--instruction", options.instruction), ("--stop", stops)):
        for text in texts or ():
            unicode(name, text)
    make, sizes, tokenizer, template, ends = load(Path(options.run), mesh=mesh)
    if options.prompt is None:
        if template == "text":
            raise UserError(f"{options.run} was trained with data.template = text, which has no instructions: use --prompt")
        talks = [{"conversation": _conversation(name)} for name in options.messages or ()]
        records: list[Any] = talks or [{"instruction": text, "input": "", "output": ""} for text in written]
        _, asked = prompts(records, tokenizer, template, "--messages" if talks else "--instruction")
    else:
        asked = [encoded(tokenizer, text) for text in written]
    processes.same({"prompts": asked})  # a file or standard input may be another
    padded_length(sizes, asked, options.max_new_tokens)  # before a large model is loaded for nothing
    model = make()
    answers = Answers(tokenizer, stops, len(asked), ends)
    pieces = stream(model, asked, max_new_tokens=options.max_new_tokens, end=ends.ids, sampling=sampling)
    printed, start, first = 0, 0.0, 0
    for number, piece in enumerate(pieces):
        answers.add(piece)
        if len(asked) == 1:
            printed += show(answers.certain(printed))
        if number == 0:  # the first token is prefill's; everything is compiled by now
            start, first = time.perf_counter(), answers.count()
        if answers.finished():
            break
    seconds, count = time.perf_counter() - start, answers.count() - first
    if len(asked) == 1:
        print(answers.text(0)[0][printed:])
    else:
        for row, text in enumerate(written):
            print(f"--- {text}\n{answers.text(row)[0]}")
    if count and processes.is_first():
        print(
            f"{counted(count, 'token')} in {seconds:.2f} s: {count / seconds:.1f} tokens/s (decoding, without prefill and compile)",
            file=sys.stderr,
        )
    return 0


def _conversation(name: str) -> Any:
    """The conversation in a file, or in what standard input says. Raises UserError that names the file, and the message."""
    from moejax.data.conversation import to_answer
    from moejax.data.records import texts_in, unicode
    from moejax.documents import read_text

    where = f"--messages {name}"
    try:
        given = json.loads(sys.stdin.read() if name == "-" else read_text(Path(name), "--messages "))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON ({first_line(error)}): expected a list of messages") from None
    if not isinstance(given, list | dict):
        raise UserError(f"{where}: expected a list of messages, or an object that has it under messages, got {str(given)[:40]!r}")
    talk = to_answer(given if isinstance(given, dict) else {"messages": given}, where)
    for text in texts_in([*talk.messages, *(talk.tools or ())], 99, keys=True):
        unicode(where, text)
    return talk


def show(text: str) -> int:
    """Print it unchanged. Returns its length."""
    print(text, end="", flush=True)
    return len(text)
