"""What vLLM and SGLang load of an adapter: their rules, on every family."""

import json
from dataclasses import replace

import pytest

from moejax.errors import UserError
from moejax.hub.servers import SERVERS, check, rename_targets, started
from moejax.models.config import PRESETS
from moejax.models.config.adapters import Pair

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("w1", "w2", "w3")
VLLM, SGLANG = SERVERS["vllm"], SERVERS["sglang"]


def pairs(*targets, **others):
    return dict.fromkeys(targets, Pair(8, 16.0)) | others


@pytest.mark.parametrize("server", [VLLM, SGLANG])
@pytest.mark.parametrize("preset", ["mixtral-tiny", "qwen3-moe-tiny", "olmoe-tiny"])
def test_what_a_family_trains_by_default_but_for_the_router_is_held(server, preset):
    check(server, PRESETS[preset], pairs(*ATTENTION, *EXPERTS), ())
    check(server, PRESETS[preset], pairs(*EXPERTS), ())
    check(server, PRESETS[preset], pairs("o_proj"), ())


def test_vllm_holds_the_router_and_several_ranks():
    check(VLLM, PRESETS["mixtral-tiny"], pairs(*EXPERTS, gate=Pair(2, 1.0)), ())


@pytest.mark.parametrize(
    ("server", "preset", "adapted", "rows", "message"),
    [
        (SGLANG, "mixtral-tiny", pairs(*EXPERTS, "gate"), (), r"cannot hold adapters on gate \(the router.*\[w1, w2, w3\], or serve"),
        (SGLANG, "olmoe-tiny", pairs("gate"), (), r"adapter\.targets=\[q_proj, k_proj, v_proj, o_proj, gate_proj, down_proj, up_proj\]"),
        (SGLANG, "qwen3-moe-tiny", pairs("q_proj", *EXPERTS), (), r"cannot hold q_proj without v_proj: train another with v_proj among"),
        (SGLANG, "qwen3-moe-tiny", pairs("o_proj", w1=Pair(4, 8.0), w2=Pair(4, 8.0), w3=Pair(4, 8.0)), (),
         r"several ranks and alphas \(here o_proj 8 and 16, gate_proj 4 and 8, .*one adapter\.rank and one adapter\.alpha"),
        (VLLM, "qwen3-moe-tiny", pairs("w1", "w3"), (), r"cannot hold gate_proj and up_proj without down_proj: "),
        (VLLM, "mixtral-tiny", pairs("o_proj", q_proj=Pair(640, 1.0)), (), r"cannot hold rank 640 \(at most 512\)"),
        (VLLM, "mixtral-tiny", pairs("o_proj"), (510, 511), r"cannot hold rows of tokens, and 2 were trained: train another"),
        (VLLM, "flex-olmo-tiny", pairs("o_proj", *EXPERTS), (), r"cannot hold adapters on gate_proj .*adapter\.targets=\[o_proj\]"),
        (SGLANG, "flex-olmo-tiny", pairs("o_proj"), (), r"SGLang 0\.5\.23 is not known to load adapters of a FlexOlmo \(known: mi"),
    ],
)  # fmt: skip
def test_what_is_not_held_is_named(server, preset, adapted, rows, message):
    with pytest.raises(UserError, match=message) as told:
        check(server, PRESETS[preset], adapted, rows)
    assert "merged" in str(told.value)


def test_sglang_looks_for_experts_under_other_names(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"r": 2, "target_modules": ["q_proj", "w1", "w2", "w3"]}))
    rename_targets(SGLANG, tmp_path)
    assert json.loads(path.read_text()) == {"r": 2, "target_modules": ["down_proj", "gate_proj", "q_proj", "up_proj"]}


def test_the_command_has_the_next_rank_that_vllm_takes():
    said = started(VLLM, "a/b", "out/my run", pairs("o_proj", gate=Pair(40, 1.0)), 8)
    assert "--max-lora-rank 64 --lora-modules 'my run'='out/my run'" in said and said.endswith("""'{"num_experts_per_tok": 8}'""")
    assert started(replace(SGLANG, command="{rank}"), "b", "f", pairs("o_proj"), None) == "8"
