"""`moejax export RUN --out DIR`: what a run trained, for PyTorch and llama.cpp."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from moejax.errors import UserError
from moejax.progress import say, waiting
from moejax.runtime import prepare_jax_for

_GGUF = dict.fromkeys(("ollama", "llama.cpp", "llamacpp", "lmstudio"), "--format gguf")
_NO_SERVERS = _GGUF | {"gguf": "--format gguf"} | dict.fromkeys(("transformers", "tgi", "merged"), "--format merged")
_NO_FORMATS = _GGUF | {"vllm": "--for vllm", "sglang": "--for sglang", "adapter": "--format peft", "safetensors": "--format merged"}
"""What somebody may ask for -> what gives that."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a finished run's folder, e.g. runs/demo")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    kind = parser.add_mutually_exclusive_group()
    servers, formats = ("peft", "vllm", "sglang"), ("peft", "fused", "merged", "gguf")
    kind.add_argument(
        "--for", dest="server", type=_meant("--for", _NO_SERVERS), choices=servers, help="an adapter as this loads it; refused where it "
        "cannot"
    )  # fmt: skip
    kind.add_argument(
        "--format", type=_meant("--format", _NO_FORMATS), choices=formats, help="default: the adapter if one was trained, else "
        "the model; fused: an adapter for transformers 5 with PEFT 0.19 or later; gguf: the merged model for llama.cpp and Ollama"
    )
    parser.add_argument("--type", metavar="TYPE", help="of a GGUF file's matrices: f16 (default), bf16 or q8_0")
    parser.add_argument("--without-tokenizer", action="store_true", help="a GGUF file that takes and gives token ids, where llama.cpp "
        "does not know the tokenizer")  # fmt: skip
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="reload what was written, compare its logits")
    parser.add_argument("--tolerance", type=float, metavar="SHARE", help="largest logit difference, as a share of the "
        "largest logit (default: 0.05 of a model, 0.1 in q8_0, 0.00001 of an adapter)")  # fmt: skip
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload what was written to the Hub, as a private repository")
    parser.add_argument("--public", action="store_true", help="with --push: as one that everybody sees")


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
    from moejax.runs.export import export

    out = Path(options.out)
    file = (options.type, not options.without_tokenizer)
    export(Path(options.run), out, options.format, options.verify, options.tolerance, options.server, *file)
    if options.push is not None:
        with waiting(f"uploading {out}"):
            address = push(out, options.push, public=options.public)
        say(f"uploaded: {address}")
    return 0
