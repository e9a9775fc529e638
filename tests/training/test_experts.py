"""The experts' backend: told at the start, refused where the compiler would make something else of it."""

from functools import partial

import numpy as np
import pytest
from support import ROOT

from moejax import cli, config
from moejax.errors import UserError
from moejax.gpus import GPUS
from moejax.models.config import PRESETS
from moejax.models.ops import choice
from moejax.models.ops.grouped import matmul as gm
from moejax.training import experts, start

CONFIG = ROOT / "configs" / "bench_mixtral_tiny.yaml"


def experiment(*overrides):
    loaded = config.load(CONFIG, overrides)
    return loaded, loaded.model.architecture(None)


def test_the_choice_is_told_with_its_reason(monkeypatch):
    monkeypatch.setattr(choice, "table", lambda _: {})
    assert experts.announce(*experiment()) == "experts: loop, tiles of 128 and 32 rows (auto, not measured on cpu)"
    entry = {"rows_per_expert": 320, "hidden": 256, "intermediate": 512, "quantized": True}
    entry |= {"backend": "capacity", "tile": 64, "small_tile": 16}
    monkeypatch.setattr(choice, "table", lambda _: {"cpu": [entry | {"measured": "results/x.json"}]})
    told = experts.announce(*experiment())
    assert told == "experts: capacity, 392 rows an expert in one batch, the rest in tiles of 64 (auto, measured: results/x.json)"
    assert experts.plan(*experiment(), 1280).backend == "capacity"
    assert experts.announce(*experiment("model.moe_backend=loop")) == "experts: loop, tiles of 64 and 16 rows (model.moe_backend)"
    assert experts.announce(*experiment("model.experts_per_token=8")).startswith("experts: dense")


def test_a_gpu_says_by_what_it_attends():
    """In the bench config's fp32, and in bf16; rows of 128 tokens; a CPU says nothing."""

    def told(*overrides, platform="NVIDIA L4"):
        return experts.announce_attention(*experiment(*overrides), platform)

    fp32 = "attention: blocks of queries (jax's flash attention computes in bfloat16 here, and training.compute_dtype is float32)"
    bf16 = "training.compute_dtype=bfloat16"
    assert (told(), told(platform="cpu")) == ([fp32], [])
    assert told(bf16) == ["attention: flash, by the kernels of jax"]
    assert told(bf16, "model.attention=blocks") == ["attention: blocks of queries (model.attention)"]
    short = told(bf16, "data.row_tokens=64", "data.max_length=64")
    assert short == ["attention: blocks of queries (rows of 64 tokens, flash attention begins at 128)"]


def test_a_tpu_says_what_it_multiplies_and_how():
    """OLMoE by XLA's ragged product; fp32 with its precision; and another card refuses what is a TPU's."""
    fp32 = experts.precision(*experiment()[:1], "TPU v5 lite")
    assert "round their operands" in fp32[0] and not experts.precision(*experiment()[:1], "NVIDIA L4")
    olmoe = partial(gm.choose, hidden=2048, intermediate=1024, quantized=True, memory_bytes=16 * 10**9)
    plan = olmoe("auto", "TPU v5 lite", 1024, 64, 8)
    assert (plan.backend, plan.tile) == ("ragged", 0)
    # Of rows that are mostly other devices' tiles of one size: a quarter of a mean group, as many as its kernels' or more.
    plans = olmoe("auto", "TPU v5 lite", 8192, 64, 8, dealt=True), olmoe("loop", "TPU v5 lite", 1024, 64, 8)
    assert [(p.backend, p.tile, p.small_tile) for p in plans] == [("loop", 256, 256), ("loop", 128, 128)]
    assert gm.choose("auto", "TPU v5 lite", 1024, 8, 2, hidden=4096, intermediate=14336, memory_bytes=16 * 10**9).backend == "loop"
    with pytest.raises(UserError, match=r"ragged is for a TPU: .* and this is a NVIDIA L4\. Expected auto, loop or capacity"):
        experts.check(*experiment("model.moe_backend=ragged"), "NVIDIA L4")
    gpt_oss = config.load(ROOT / "configs/gpt_oss_20b.yaml", ["model.attention=flash"])
    sizes = gpt_oss.model.architecture(None)
    experts.check_attention(gpt_oss, sizes, "TPU v5 lite")  # sinks and windows are there
    assert experts.announce_attention(gpt_oss, sizes, "TPU v5 lite") == ["attention: flash, by the kernels of jax"]
    with pytest.raises(UserError, match=r"flash: .* in bfloat16 here, and training\.compute_dtype is float32\. Expected auto .* or blocks"):
        experts.check_attention(gpt_oss.changed("training", compute_dtype="float32"), sizes, "TPU v5 lite")


def test_kernels_that_decode_are_for_gpus_that_can_run_them():
    """Asked for by name, at any size; without a measurement `auto` never takes them."""
    asked = experiment("model.moe_backend=decode")
    plan = gm.choose("decode", "NVIDIA L4", 128, 8, 2, hidden=4096, intermediate=14336, quantized=True, memory_bytes=24 * 10**9)
    assert (plan.backend, plan.tile) == ("decode", 0)
    what = "one kernel a product for all rows, which decodes 4-bit codes itself"
    assert experts.announce(*asked) == f"experts: decode, {what} (model.moe_backend)"
    experts.check(*asked, "NVIDIA A100-SXM4-80GB")
    for platform, why in (("cpu", "this is a CPU"), ("TPU v5 lite", "this is a TPU v5 lite"), ("Tesla T4", "Tesla T4 has 7.5")):
        with pytest.raises(UserError, match=rf"model\.moe_backend = decode is for .*{why}\. Expected auto, loop or capacity"):
            experts.check(*asked, platform)


@pytest.mark.parametrize("device", ["TPU v5 lite", "NVIDIA L4"])
def test_latent_attention_goes_by_blocks_everywhere(device):
    """GLM's heads have 256 numbers, as splash attention takes them."""
    glm = config.load(ROOT / "configs/glm_4.7_flash_24gb.yaml", ["model.attention=auto"])
    said = experts.announce_attention(glm, glm.model.architecture(None), device)
    assert said == ["attention: blocks of queries (latent attention goes by blocks)"]


def test_flash_that_cannot_run_is_refused_by_the_dry_run_and_before_anything_is_read(tmp_path, monkeypatch, capsys):
    """The dry run refuses what no card can run; the run also what this machine cannot."""
    gpt_oss = ["train", str(ROOT / "configs/gpt_oss_20b.yaml"), "model.attention=flash", f"runs_dir={tmp_path}"]
    assert cli.main([*gpt_oss, "--dry-run"]) == 2
    assert "no sinks and no window (here of 128 positions)" in capsys.readouterr().err
    monkeypatch.setattr(start, "read_data", None)
    assert cli.main(["train", str(CONFIG), "model.attention=flash", f"runs_dir={tmp_path}"]) == 2
    assert "this is a CPU" in capsys.readouterr().err


def test_the_scans_kernel_is_for_gpus_that_can_run_it():
    """Asked for by name: refused with what runs instead. By itself it runs nowhere until it was measured there."""
    scans = config.load(ROOT / "configs" / "blackmamba_2.8b_cs_sparse.yaml", ["model.scan=kernel"])
    sizes = scans.model.architecture(None)
    experts.check_scan(scans, sizes, "NVIDIA A100-SXM4-80GB")
    experts.check_scan(scans, sizes, "NVIDIA of tomorrow")
    instead = r"Expected auto \(chunked_associative, chunks of 32 tokens, runs instead\)"
    with pytest.raises(UserError, match=r"needs compute capability 8\.0, and Tesla T4 has 7\.5\. " + instead):
        experts.check_scan(scans, sizes, "Tesla T4")
    with pytest.raises(UserError, match=r"model\.scan = kernel: .* this is a CPU\. Expected auto \(chunked, chunks of 16 tokens"):
        experts.check_scan(scans, sizes, "cpu")
    with pytest.raises(UserError, match=r"this is a TPU v5 lite\. " + instead):
        experts.check_scan(scans, sizes, "TPU v5 lite")
    mixtral = experiment()[1]
    with pytest.raises(UserError, match=r"model\.scan = kernel: this model has no selective scan"):
        experts.check_scan(scans, mixtral, "NVIDIA L4")
    assert experts.announce_scan(scans, sizes, "NVIDIA L4") == ["selective scan: kernel, chunks of 16 tokens (model.scan)"]
    told = experts.announce_scan(scans.changed("model", scan="auto"), sizes, "NVIDIA L4")
    assert told == ["selective scan: chunked_associative, chunks of 32 tokens (auto, not measured here)"]
    assert experts.announce_scan(scans, sizes, "cpu") == experts.announce_scan(scans, mixtral, "NVIDIA L4") == []


def test_the_nearest_measured_shape_decides(monkeypatch):
    def entry(rows, hidden, quantized, tile):
        shape = {"rows_per_expert": rows, "hidden": hidden, "intermediate": hidden, "quantized": quantized}
        return shape | {"backend": "loop", "tile": tile, "small_tile": 8}

    table = {"NVIDIA X": [entry(256, 1024, False, 64), entry(4096, 1024, False, 256), entry(4096, 1024, True, 512)]}
    monkeypatch.setattr(choice, "table", lambda _: table)

    def tile(tokens, quantized=False, kind="NVIDIA X"):
        return gm.choose("auto", kind, tokens, 8, 2, hidden=1024, intermediate=1024, quantized=quantized).tile

    assert [tile(1200), tile(8192), tile(8192, quantized=True), tile(8192, kind="NVIDIA Y")] == [64, 256, 512, 2048]


def test_many_experts_are_dequantized_at_once_where_a_layer_of_them_is_small():
    """Of Qwen3-30B-A3B 1.2 GB in bf16: on a card of 48 GB, not of 24, not in fp32; and not for a few rows, which few experts see."""
    qwen, olmoe, mixtral = PRESETS["qwen3-30b-a3b"], PRESETS["olmoe-1b-7b"], PRESETS["mixtral-8x7b"]

    def backend(model, card, tokens=2048, **more):
        target, quantized = GPUS[card], {"quantized": True}
        sizes = {"hidden": model.hidden_size, "intermediate": model.intermediate_size, "memory_bytes": target.memory_bytes}
        k = model.experts_per_token
        return gm.choose("auto", target.cuda_name, tokens, model.num_experts, k, **sizes, **(quantized | more)).backend

    assert [backend(qwen, card) for card in ("L4", "A40", "A100-80", "H100")] == ["loop", "capacity", "capacity", "capacity"]
    assert [backend(qwen, "A40", item=4), backend(qwen, "H100", tokens=8), backend(olmoe, "L4")] == ["loop", "loop", "capacity"]
    assert backend(mixtral, "H200") == "loop"
    assert gm.choose("auto", "gpu", 2048, 128, 8, hidden=2048, intermediate=768).backend == "loop"  # who knows how much memory?
    assert gm.choose("auto", "cpu", 2048, 128, 8, hidden=512, intermediate=192).backend == "loop"


def test_a_measured_capacity_is_taken_where_it_fits(monkeypatch):
    shape = {"rows_per_expert": 512, "hidden": 1024, "intermediate": 1024, "quantized": True}
    entry = shape | {"backend": "capacity", "tile": 256, "small_tile": 64}
    monkeypatch.setattr(choice, "table", lambda _: {"NVIDIA X": [entry]})
    found = [gm.choose("auto", "NVIDIA X", 2048, 8, 2, quantized=True, memory_bytes=int(gb * 1e9)).backend for gb in (1.3, 1.1)]
    assert found == ["capacity", "loop"]  # 3 matrices of 8 experts are 50 MB


def test_the_architecture_of_the_real_model_is_unmeasured_until_a_gpu_was_there():
    real = PRESETS["mixtral-8x7b"]
    sizes = {"hidden": 4096, "intermediate": 14336, "quantized": True}
    plan = gm.choose("auto", GPUS["H100"].cuda_name, 4096, real.num_experts, 2, **sizes)
    assert (plan.backend, plan.tile, plan.small_tile) == ("loop", 1024, 128)


def test_tiles_of_a_gpu_follow_the_roofline():
    """A group that fits into what a product reads its matrix for is one tile; larger ones are few tiles, their rest small ones."""

    def tiles(tokens, experts=8, k=2):
        plan = gm.choose("auto", "gpu", tokens, experts, k, hidden=4096, intermediate=14336, quantized=True)
        return plan.tile, plan.small_tile

    assert [tiles(n) for n in (128, 512, 1024, 4096, 49152)] == [(128, 128), (256, 256), (256, 128), (1024, 128), (4096, 128)]
    assert (tiles(1), tiles(16), tiles(2048, 128, 8)) == ((8, 8), (32, 32), (256, 256))  # no more than there are rows
    plan = gm.choose("loop", "gpu", 512, 8, 2)
    assert (plan.tile, plan.small_tile) == (256, 256)
    trips = experts.routed(plan, np.array([0, 1, 256, 257, 128, 128, 128, 126]))
    assert trips("moe/tiles/while", None) * 8 == 8 and trips("moe/small_tiles/while", None) == 0


def test_drawn_routings_are_uneven():
    sizes = PRESETS["mixtral-8x7b"]
    drawn = experts.random_loads(sizes, 4096)
    assert drawn.shape == (64, 8) and (drawn.sum(axis=1) == 8192).all() and 20 < drawn.std() < 40
