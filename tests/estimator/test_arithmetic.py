"""Sums by hand: what a step's work is."""

import pytest

from moejax import gpus
from moejax.estimator import roofline
from moejax.models.config import PRESETS, LoRAConfig


def test_roofline_arithmetic():
    """Against counts by hand: Mixtral's 46.7 B weights, 6.6 B of them FLOPs' worth for a token of two experts."""
    mixtral = roofline.work(PRESETS["mixtral-8x7b"], "qlora")
    assert mixtral.expert_weights == 32 * 3 * 4096 * 14336
    assert mixtral.weights == pytest.approx(46.70e9, rel=1e-3)  # norms left out
    assert mixtral.rest_weights == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 8)
    assert roofline.work(PRESETS["blackmamba-2.8b"], "full").weights == pytest.approx(2.783e9, rel=1e-3)
    assert roofline.adapter_weights(PRESETS["mixtral-8x7b"]) == 228_593_664
    assert roofline.adapter_weights(PRESETS["mixtral-8x7b"], LoRAConfig(share=("w1", "w3"))) == 211_816_448
    # Two passes over what a frozen model's token meets, at the peak.
    flops = 2 * 2 * (mixtral.rest_weights + 2 * mixtral.expert_weights + 32000 * 4096)
    assert mixtral.least_seconds(gpus.find("H100"), 1e6, 0.25) == pytest.approx(1e6 * flops / 989e12)
    # A single token: the two experts it meets and the rest in NF4 (0.516 bytes a weight), the head in bf16, both read twice.
    read = 0.5159 * (mixtral.rest_weights + 2 * mixtral.expert_weights) + 2 * 32000 * 4096
    assert mixtral.least_seconds(gpus.find("H100"), 1, 0.25) == pytest.approx(2 * read / 3350e9, rel=1e-4)
