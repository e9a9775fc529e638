"""`moejax chat RUN`: chat with the model of a finished run, in a terminal or through a pipe."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

from moejax.commands.arguments import add_mesh, add_run, check_counts, settle_run
from moejax.commands.generate import show
from moejax.errors import UserError
from moejax.estimator.units import counted
from moejax.runtime import prepare_jax_for

LINES = "A line is a message. /reset forgets the conversation; /exit or Ctrl-D ends; Ctrl-C stops an answer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_mesh(parser)
    parser.add_argument("--base", action="store_true", help="use the base model, without the adapter")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help="maximum length of an answer (default: 512, at most half the model's positions)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 (default): greedy decoding")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the smallest set of tokens with this total probability")
    parser.add_argument("--top-k", type=int, default=None, help="sample from the K most likely tokens")
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling (default: 0)")
    parser.epilog = LINES


def run(options: argparse.Namespace) -> int:
    """Answers go to standard output as they are decoded, all else to standard error."""
    settle_run(options)
    folder = Path(options.run)
    prepare_jax_for(options.run)
    from moejax.data.records import unicode
    from moejax.evaluation.dialogue import Dialogue, has_turns
    from moejax.evaluation.generate import Sampling
    from moejax.runs.devices import alone, mesh_of
    from moejax.runs.open import load

    mesh = mesh_of(folder, options.overrides)
    alone(mesh, "moejax chat")
    if sys.stdin is None:
        raise UserError("standard input is closed, and messages are read from it: call it in a terminal, or give it a pipe or a file")
    terminal = sys.stdin.isatty()
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    check_counts(options, "max_new_tokens")
    unicode("--system", options.system)
    make, _, tokenizer, template, ends = load(folder, options.base, mesh)
    if template == "text":
        raise UserError(f"{folder} was trained with data.template = text, which has no messages: moejax generate {folder} --prompt TEXT")
    if not (folder / "config.yaml").is_file() and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{folder} is a model whose tokenizer has no chat template: how it is asked stands nowhere. Give the folder of the run that "
            f"trained it, or continue a text: moejax generate {folder} --prompt TEXT"
        )
    if not has_turns(tokenizer, template, options.system):  # before the weights are read
        _tell("the template has no second turn: each message is answered by itself")
    settings = {"system": options.system, "max_new_tokens": options.max_new_tokens}
    dialogue = Dialogue(make(), tokenizer, template, ends, sampling, **settings)
    if terminal:
        _tell(LINES)
    seconds, tokens = 0.0, 0
    for line in _messages(terminal):
        if line == "/exit":
            break
        if line == "/reset":
            dialogue.reset()
            continue
        try:
            with _stopping() as stopped, closing(dialogue.ask(line)) as answer:
                for number, text in enumerate(answer):
                    if number == 0:  # everything is compiled by now, and the first token is prefill's
                        begun, first = time.perf_counter(), dialogue.tokens
                    show(text)
                    if stopped:
                        break
                seconds, tokens = seconds + time.perf_counter() - begun, tokens + dialogue.tokens - first
        except UserError as error:
            if not terminal:  # what follows it in a file would answer to something else
                raise
            _tell(f"error: {error}")
            continue
        print(flush=True)
        if stopped:
            _tell("(stopped)")
        elif dialogue.cut:
            _tell(f"(cut at {counted(dialogue.max_new_tokens, 'token')}: --max-new-tokens)")
    if tokens:
        _tell(f"{counted(tokens, 'token')} in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s (decoding, without prefill and compile)")
    return 0


def _messages(terminal: bool) -> Iterator[str]:
    """The lines of standard input, but for blank ones."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is not UTF-8 is reported with its message
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (lets `input` edit lines and find earlier ones)
    while True:
        try:
            line = (input("> " if sys.stdout.isatty() else "") if terminal else next(sys.stdin)).strip()
        except (EOFError, StopIteration):
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            _tell("\n(/exit or Ctrl-D ends)")
            continue
        if line:
            yield line


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Within it Ctrl-C is kept in the list, for anyone who looks there; a second time it ends the program."""
    kept: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if kept:
            raise KeyboardInterrupt
        kept.append(number)

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield kept
    finally:
        signal.signal(signal.SIGINT, previous)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
