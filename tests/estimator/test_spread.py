"""What each device of a mesh holds and receives: to the byte of `moejax.mesh`, and by hand."""


import pytest

from moejax import mesh
from moejax.config import Experiment
from moejax.estimator import closed_form, sizes, spread
from moejax.training.program import TrainProgram

NF4 = {"quantization": {"format": "nf4"}, "adapter": {"rank": 16, "targets": ["w1", "w2", "w3", "gate"]}}


def experiment(preset="mixtral-tiny", weights="whole", moments="whole", devices=4, *, training=None, **sections):
    content = {
        "name": "mesh", "model": {"preset": preset}, "data": {"batching": "fixed", "row_tokens": 64, "batch_rows": 8},
        "training": {"steps": 1, "compute_dtype": "float32"} | (training or {}),
        "mesh": {"devices": devices, "weights": weights, "moments": moments},
    }  # fmt: skip
    return Experiment.model_validate(content | sections)


CASES = {
    "whole": experiment(**NF4),
    "whole, moments in parts": experiment(moments="spread", **NF4),
    "spread": experiment(weights="spread", **NF4),
    "experts": experiment(weights="experts", moments="spread", **NF4),
}
MORE = {
    "spread, single scales": experiment(weights="spread", devices=2, quantization={"format": "nf4", "double": False}, adapter={"rank": 4}),
    "spread, not quantized": experiment("qwen3-moe-tiny", "spread", adapter={"rank": 4}),
    "spread, latent attention": experiment("deepseek-v3-tiny", "spread", quantization={"format": "nf4"}, adapter={"rank": 4}),
    "spread, MXFP4": experiment("gpt-oss-tiny", "spread", adapter={"rank": 4}),
    "experts, MXFP4 and biases": experiment("gpt-oss-tiny", "experts", devices=2, adapter={"rank": 4}),
    "experts, shared ones": experiment("deepseek-v3-tiny", "experts", quantization={"format": "nf4"}, adapter={"rank": 4}),
    "experts, all trained": experiment("blackmamba-tiny", "experts", moments="spread"),
    "experts, adafactor": experiment(weights="experts", training={"optimizer": "adafactor"}),
    "moments of Lion": experiment(moments="spread", training={"optimizer": "lion", "moments_dtype": "bfloat16"}, **NF4),
    "moments of adafactor": experiment(moments="spread", training={"optimizer": "adafactor"}),
    "moments in 8 bits": experiment(moments="spread", training={"optimizer": "adamw_8bit"}),
    "experts, moments in 8 bits": experiment(weights="experts", training={"optimizer": "adamw_8bit"}, **NF4),
    "experts, moments in 8 bits, in parts": experiment(weights="experts", moments="spread", training={"optimizer": "adamw_8bit"}),
    "what two devices divide": experiment(weights="spread", moments="spread", devices=2, **NF4),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_arguments_to_the_byte(name):
    """As the trees of the step lie on an abstract mesh."""
    case = (CASES | MORE)[name]
    architecture = case.model.architecture(None)
    program = TrainProgram(case.model_copy(update={"mesh": None}), architecture)
    on = mesh.abstract(case.mesh, case.mesh.devices)
    state = program.state
    placed = ((state.trainable, on.of_weights), (state.opt_state, on.of_optimizer), (program.frozen, on.of_weights))
    held = sum(mesh.device_bytes(tree, places(tree)) for tree, places in placed)
    made = closed_form.breakdown(case, architecture, rows=8, row_tokens=64, platform="sm9")
    assert made.arguments - made.batch == held
    assert made.batch == sizes.batch_bytes(architecture, 1, 8 // case.mesh.devices, 64)


def test_what_a_device_receives_by_hand():
    """8x7B's own figures: 32 layers, 4096 wide, 2,048 tokens a device; codes half a byte a weight, a scale of a byte for 64 of them."""
    matrices = 8 * 3 * 4096 * 14336
    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096
    byte = 0.5 + 1 / 64
    for n in (2, 8):
        found = {}
        for weights in ("whole", "spread", "experts"):
            case = experiment("mixtral-8x7b", weights, devices=n, training={"remat": "full", "compute_dtype": "bfloat16"}, **NF4)
            found[weights] = spread.traffic(case, case.model.architecture(None), 4 * n * 512)
        on_experts, router = 32 * 8 * 16 * 3 * (4096 + 14336), 32 * 16 * (4096 + 8)
        assert found["whole"] == (0, 0, pytest.approx(2 * (n - 1) / n * 4 * (on_experts + router)), 0)
        assert found["spread"].weights == pytest.approx((n - 1) / n * 2 * 32 * byte * (matrices + attention))
        assert found["spread"].gradients == found["whole"].gradients and found["spread"].rows == 0
        rows = 5 * 32 * (n - 1) * 2048 * 2 * 4096
        assert rows < found["experts"].rows < 1.002 * rows and found["experts"].weights == 0
        assert found["experts"].gradients == pytest.approx(2 * (n - 1) / n * 4 * router)
    twice = experiment("mixtral-8x7b", "spread", "spread", 2, training={"gradient_accumulation": 2, "remat": "none"}, **NF4)
    found = spread.traffic(twice, twice.model.architecture(None), 8 * 512)
    assert found.weights == pytest.approx(0.5 * 2 * 2 * 32 * byte * (matrices + attention)) and found.rows == 0
    assert found.updates == found.gradients == pytest.approx(0.5 * 4 * (on_experts + router))
    assert spread.traffic(twice.model_copy(update={"mesh": None}), twice.model.architecture(None), 8 * 512).total == 0
