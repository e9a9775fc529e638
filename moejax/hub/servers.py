"""What vLLM and SGLang load of an adapter, as their loaders say it: names and limits by family, and no jax.

vLLM: vllm/lora/{peft_helper,lora_model,lora_weights,model_manager}.py, vllm/config/lora.py and the families' files in
vllm/model_executor/models. SGLang: sglang/srt/lora/{lora,lora_config,lora_manager,mem_pool,utils}.py. Both as on PyPI.
tests/oracles/check_served.py reads an export with vLLM's own loader.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from moejax.documents import read_json
from moejax.errors import UserError
from moejax.hub.names import in_and_out
from moejax.hub.save import write_json
from moejax.models.config import Architecture
from moejax.models.config.adapters import Pair

_EXPERTS = ("w1", "w2", "w3")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Server:
    """Targets are by our names.

    version, read: of the loader, and the day it was read. families: `model_type` -> the targets that it loads. together: where one of
    the first is adapted, all of the second must be. one_pair: one rank and one alpha hold for every target. ranks: what the server's
    largest rank may be set to; empty: anything. names: what its adapter_config.json calls a module, where the tensors have another name.
    """

    title: str
    version: str
    read: str
    families: Mapping[str, tuple[str, ...]]
    together: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    command: str
    dense: str
    one_pair: bool = False
    ranks: tuple[int, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)


SERVERS = {
    "vllm": Server(
        "vLLM", "0.32.0", "2026-11-30",
        # FlexOlmo runs there by transformers' own code, which lists an expert's matrices under two names: only one is found.
        # gpt-oss's experts are read as PEFT has them, all in one tensor; its router's product is not one that an adapter can be on.
        {**dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), (*_ATTENTION, "gate", *_EXPERTS)), "flex_olmo": (*_ATTENTION, "gate"),
         "gpt_oss": (*_ATTENTION, *_EXPERTS)},
        together=((_EXPERTS, _EXPERTS),),
        command="vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}",
        dense="--hf-overrides",
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    ),
    "sglang": Server(
        "SGLang", "0.5.23", "2026-11-30",
        dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), (*_ATTENTION, *_EXPERTS)),
        together=((_EXPERTS, _EXPERTS), (("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj"))),
        command="python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {name}={folder}",
        dense="--json-model-override-args",
        one_pair=True,
        names={"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
    ),
}  # fmt: skip


def check(server: Server, sizes: Architecture, pairs: Mapping[str, Pair], rows: Collection[int]) -> None:
    """Raises UserError that names the part of an adapter which the server's format cannot hold, and what to do.

    pairs: rank and alpha of each adapted target; rows: ids of tokens whose rows were trained.
    """
    theirs, loads = sizes.target_names, server.families.get(sizes.model_type)
    merged = "serve the merged model (--format merged)"
    does = f"{server.title} {server.version}"
    if loads is None:
        raise UserError(
            f"--for {server.title.lower()}: {does} is not known to load adapters of a {sizes.title} (known: {', '.join(server.families)}): "
            f"{merged}"
        )

    def refuse(part: str, train: str) -> None:
        raise UserError(f"--for {server.title.lower()}: {does} cannot hold {part}: {train}, or {merged}")

    for target in pairs:
        if target not in loads:
            what = "the router, which this adapter trains too" if target == "gate" else "what this adapter trains"
            kept = ", ".join(theirs[name] for name in pairs if name in loads) or ", ".join(theirs[name] for name in loads)
            refuse(f"adapters on {theirs[target]} ({what})", f"train another with adapter.targets=[{kept}]")
    for any_of, needed in server.together:
        missing = [theirs[name] for name in needed if name not in pairs]
        if missing and any(name in pairs for name in any_of):
            there = " and ".join(theirs[name] for name in any_of if name in pairs)
            refuse(f"{there} without {' and '.join(missing)}", f"train another with {' and '.join(missing)} among adapter.targets")
    distinct = {(pair.rank, pair.alpha) for pair in pairs.values()}
    if server.one_pair and len(distinct) > 1:
        told = ", ".join(f"{theirs[name]} {pair.rank} and {pair.alpha:g}" for name, pair in pairs.items())
        refuse(f"several ranks and alphas (here {told})", "train another with one adapter.rank and one adapter.alpha")
    largest = max(pair.rank for pair in pairs.values())
    if server.ranks and largest > server.ranks[-1]:
        refuse(f"rank {largest} (at most {server.ranks[-1]})", "train another with a smaller adapter.rank")
    if rows:
        refuse(f"rows of tokens, and {len(rows)} were trained", "train another without added_tokens and adapter.token_rows")


def as_stored(sizes: Architecture, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """Pairs as the adapter's file has them: where one is of both w1 and w3 (a family whose files have all experts in one tensor), with
    both A's in it."""
    both = ("w1", "w3") if in_and_out(sizes) and "w3" in pairs and pairs["w3"].shares is None else ()
    return {name: replace(pair, rank=2 * pair.rank, alpha=2 * pair.alpha) if name in both else pair for name, pair in pairs.items()}


def rename_targets(server: Server, folder: Path) -> None:
    """Call the modules in the adapter's adapter_config.json as the server looks for them; tensors keep their names."""
    path = folder / "adapter_config.json"
    config = read_json(path)
    write_json(path, config | {"target_modules": sorted(server.names.get(name, name) for name in config["target_modules"])})


def started(server: Server, base: str, folder: str, pairs: Mapping[str, Pair], experts_per_token: int | None) -> str:
    """The command that serves the adapter in `folder` on the model `base`. experts_per_token: where its config.json has another."""
    largest = max(pair.rank for pair in pairs.values())
    rank, name = next((rank for rank in server.ranks if rank >= largest), largest), shlex.quote(Path(folder).name)
    command = server.command.format(base=shlex.quote(base), rank=rank, name=name, folder=shlex.quote(folder))
    if experts_per_token is None:
        return command
    return f"{command} {server.dense} {shlex.quote(json.dumps({'num_experts_per_tok': experts_per_token}))}"
