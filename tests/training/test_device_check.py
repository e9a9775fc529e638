"""A GPU that cannot compute what is asked for is refused before anything is loaded."""

from types import SimpleNamespace

import pytest

from moejax.errors import UserError
from moejax.training import device_check, loop


def gpu(capability, platform="gpu"):
    return SimpleNamespace(platform=platform, device_kind="Tesla V100-SXM2-16GB", compute_capability=capability)


def test_a_gpu_without_bf16_is_refused_and_what_works_is_named(make_experiment):
    full = {"adapter": None, "quantization": {"format": "none"}}
    bf16 = make_experiment(training={"compute_dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"V100.* 7\.0, and training\.compute_dtype = bfloat16 needs 8\.0.*compute_dtype=float32"):
        device_check.check(bf16, gpu("7.0"))
    with pytest.raises(UserError, match=r"7\.5, and training\.param_dtype = bfloat16 needs"):
        device_check.check(make_experiment(training={"param_dtype": "bfloat16"}, **full), gpu("7.5"))
    for device in (gpu("8.0"), gpu("8.6"), gpu("9.0"), gpu("10.0"), gpu("12.0"), gpu("gfx942"), gpu("", "cpu")):
        device_check.check(bf16, device)
    device_check.check(make_experiment(), gpu("7.0"))  # fp32 runs there


def test_a_run_asks_first(make_experiment, monkeypatch, tmp_path):
    monkeypatch.setattr(loop.jax, "local_devices", lambda: [gpu("7.0")])
    with pytest.raises(UserError, match="compute capability"):
        loop.run(make_experiment(training={"compute_dtype": "bfloat16"}), resume=False)
    assert not (tmp_path / "runs").exists()
