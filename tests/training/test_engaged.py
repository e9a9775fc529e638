"""What ran how often; a fallback that nobody asked for is a warning."""

import pytest
from support import ROOT

from moejax import config
from moejax.hub.model import architecture
from moejax.training import experts
from moejax.training.engaged import Engaged


def engaged(platform, name="bench_mixtral_tiny", **changes):
    experiment = config.load(ROOT / f"configs/{name}.yaml", [f"{key}={value}" for key, value in changes.items()])
    return Engaged(experiment, architecture(experiment, None), platform)


def test_passes_are_layers_times_micro_batches_times_steps():
    found = engaged("cpu")
    assert found.report() == [] and found.warnings() == []
    layers = len(found._config.expert_layer_numbers)
    found.step(4, 10, 128)
    found.step(4, 10, 128)
    assert found.passes == {("experts", "loop"): 8 * layers, ("attention", "blocks"): 8 * layers}
    assert f"experts loop {8 * layers} times" in found.report()[0] and found.warnings() == []  # a CPU has no other
    mamba = engaged("cpu", "bench_blackmamba_tiny")
    mamba.step(1, 2, 128)
    assert ("selective scan", "chunked") in mamba.passes


@pytest.mark.parametrize(("changes", "warned"), [({}, True), ({"model.attention": "blocks"}, False),
                                                 ({"training.compute_dtype": "bfloat16"}, False)])  # fmt: skip
def test_a_fallback_nobody_asked_for_is_a_warning(changes, warned):
    found = engaged("NVIDIA X", **changes)
    found.step(1, 10, 128)
    assert bool(found.warnings()) == warned
    if warned:
        assert "bfloat16" in found.warnings()[0] and "model.attention=blocks" in found.warnings()[0]
    assert (("attention", "flash") in found.passes) == ("training.compute_dtype" in changes)


def test_what_a_model_has_and_flash_attention_has_not_is_no_warning():
    """gpt-oss: sinks and windows; the start of a run says it, in the same words."""
    found = engaged("NVIDIA X", "gpt_oss_20b")
    found.step(1, 2, 512)
    assert set(found.passes) >= {("attention", "blocks")} and found.warnings() == []
    [said] = experts.announce_attention(found._experiment, found._config, "NVIDIA X")
    assert said == "attention: blocks of queries (jax's flash attention has no sinks and no window (here of 128 positions))"
