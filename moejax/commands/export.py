"""`moejax export RUN --out DIR`: export a run's adapter or model for PyTorch, servers and llama.cpp."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from moejax.commands.arguments import add_mesh, on_mesh
from moejax.errors import UserError
from moejax.progress import say, waiting
from moejax.runtime import prepare_jax_for

_GGUF = dict.fromkeys(("ollama", "llama.cpp", "llamacpp", "lmstudio"), "--format gguf")
_NO_SERVERS = _GGUF | {"gguf": "--format gguf"} | dict.fromkeys(("transformers", "tgi", "merged"), "--format merged")
_NO_FORMATS = _GGUF | {"vllm": "--for vllm", "sglang": "--for sglang", "adapter": "--format peft", "safetensors": "--format merged"}
"""What somebody may ask for -> what gives that."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, e.g. runs/demo")
    add_mesh(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; must not exist")
    kind = parser.add_mutually_exclusive_group()
    servers, formats = ("peft", "vllm", "sglang"), ("peft", "fused", "merged", "gguf")
    kind.add_argument(
        "--for", dest="server", type=_meant("--for", _NO_SERVERS), choices=servers, help="write the adapter for this loader; "
        "refuse what it cannot load"
    )  # fmt: skip
    kind.add_argument(
        "--format", type=_meant("--format", _NO_FORMATS), choices=formats, help="output format (default: the adapter if there is "
        "one, else the model). fused: adapter for transformers 5 with PEFT 0.19 or later; gguf: merged model for llama.cpp and Ollama"
    )
    parser.add_argument("--type", metavar="TYPE", help="data type of a GGUF file: f16 (default), bf16 or q8_0")
    parser.add_argument("--without-tokenizer", action="store_true", help="write a GGUF file without tokenizer, for use with token ids, "
        "where llama.cpp does not support the tokenizer")  # fmt: skip
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="reload the written files and compare logits")
    parser.add_argument("--tolerance", type=float, metavar="SHARE", help="allowed logit difference as a share of the "
        "largest logit (default: 0.05 for a model, 0.1 for q8_0, 0.00001 for an adapter)")  # fmt: skip
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the result to the Hub as a private repository")
    parser.add_argument("--public", action="store_true", help="with --push: make the repository public")


def _meant(option: str, others: Mapping[str, str]) -> Callable[[str], str]:
    """The value as it stands. Raises UserError for one of `others`, with what is meant."""

    def value(text: str) -> str:
        if text.lower() in others:
            raise UserError(f"{option} {text}: what it loads is written by {others[text.lower()]} (moejax export --help)")
        return text

    return value


def run(options: argparse.Namespace) -> int:
    from moejax.hub.push import check_name, push

    if options.public and options.push is None:
        raise UserError("--public says how to upload, and nothing is uploaded: add --push OWNER/NAME, or leave it out")
    if options.push is not None:
        check_name(options.push)
    prepare_jax_for(options.run)
    from moejax import processes
    from moejax.runs.export import export

    out = Path(options.out)
    file = (options.type, not options.without_tokenizer)
    with on_mesh(options):
        if not processes.is_first():  # a model is written from files, a tensor at a time: the others wait
            return 0
        export(Path(options.run), out, options.format, options.verify, options.tolerance, options.server, *file)
        if options.push is not None:
            with waiting(f"uploading {out}"):
                address = push(out, options.push, public=options.public)
            say(f"uploaded: {address}")
    return 0
