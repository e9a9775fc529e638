"""A step on a mesh is the step on one device: loss, every gradient, counts; and what the devices say to each other on the way."""

import jax
import numpy as np
import optax
import pytest
from on_mesh import batch_of, elsewhere, gradients_kept, model_of, run, trained
from support import ROOT

from moejax import config, mesh
from moejax.config_mesh import MeshConfig
from moejax.errors import UserError
from moejax.training.program import devices_of, initial_state
from moejax.training.step import Objective, make_train_step, sums

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1}
BASE = {"preset": "mixtral-tiny", "sizes": TINY, "backend": "loop", "devices": 4}
MODES = ("whole", "spread", "experts")


def agrees(result):
    """With one device. The loss is a sum in another order, too."""
    one, other = result["loss"]
    assert abs(one - other) <= 4e-7 * abs(one) and result["counts"]
    assert abs(result["norms"][0] - result["norms"][1]) <= 4e-6 * result["norms"][0]
    assert abs(result["aux"][0] - result["aux"][1]) <= 4e-6 * abs(result["aux"][0])
    assert result["worst"] <= 4e-6
    # Under a condition, or in a loop that data end, devices would meet each other's other collectives: silently wrong numbers.
    assert result["collectives"] and not result["under_data"]


@pytest.fixture(scope="module")
def steps():
    """{mode: what was found}."""
    return {mode: run(BASE | {"weights": mode}) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_that_of_one_device(mode, steps):
    agrees(steps[mode])


def test_without_a_mesh_nothing_is_said_of_devices():
    """Neither where anything lies, nor to each other."""
    graphdef, trainable, frozen = model_of(BASE)
    step = make_train_step(Objective(graphdef, full=False), gradients_kept(), optax.constant_schedule(1.0), 0)
    text = jax.jit(step).lower(initial_state(trainable, gradients_kept()), frozen, batch_of(4, 16, 1, 64)).as_text()
    assert not [word for word in ("sharding", "mesh", "manual", "all_reduce", "all_gather", "reduce_scatter") if word in text]


def test_whole_weights_take_one_sum_of_the_adapters(steps):
    """Nothing else but the counts and sums of a step."""
    large = [each for each in steps["whole"]["collectives"] if each[1] > 1024]
    assert [name for name, _ in large] == ["all-reduce"] and large[0][1] - steps["whole"]["shared_bytes"] in range(1024)
    assert {name for name, _ in steps["whole"]["collectives"]} == {"all-reduce"} and steps["whole"]["part"] == 1


def test_spread_weights_are_gathered_where_they_are_used(steps):
    """By the matrix: none of the collectives holds more than one."""
    gathered = [size for name, size in steps["spread"]["collectives"] if name == "all-gather"]
    assert gathered and max(gathered) == 128 * 64 // 2 // 4 and steps["spread"]["part"] < 0.75  # tables and norms are whole


def test_own_experts_need_no_sum_of_their_adapters(steps):
    reduced = [size for name, size in steps["experts"]["collectives"] if name == "all-reduce" and size > 256]
    assert len(reduced) == 1 and reduced[0] - steps["experts"]["shared_bytes"] in range(1024)
    assert steps["experts"]["shared_bytes"] < steps["whole"]["shared_bytes"] / 4
    assert {"all-gather", "reduce-scatter"} <= {name for name, _ in steps["experts"]["collectives"]}


BAD = {
    "mesh.weights=whole data.batch_rows=6": "data.batch_rows = 6 are of all 4 devices together, and do not divide: expected 4 or 8",
    "mesh.devices=3 data.batch_rows=6 mesh.weights=experts": "expected mesh.devices=2 or 4",
    "mesh.devices=9 data.batch_rows=9": "mesh.devices = 9: expected at most 4, the number of devices here",
}


@pytest.mark.parametrize("changes", BAD)
def test_what_does_not_divide_is_said_of_the_devices_that_there_are(changes):
    """With none named in the config, when they are known: before anything is read."""
    with pytest.raises(UserError, match=BAD[changes]):
        model = ["model.source=null", "model.preset=mixtral-tiny", "tokenizer=x"]
        experiment = config.load(ROOT / "configs/demo.yaml", [*model, *changes.split()])
        devices_of(experiment, experiment.model.architecture(None))


GRID = {
    **{f"{backend}, {mode}": {"backend": backend, "weights": mode} for backend in ("loop", "capacity") for mode in MODES},
    **{f"dense, {mode}": {"sizes": TINY | {"experts_per_token": 8}, "weights": mode} for mode in MODES},
    **{f"remat none, {mode}": {"remat": "none", "weights": mode} for mode in ("spread", "experts")},
    **{f"micro-batches and balance, {mode}": {"micro": 3, "rows": 8, "aux_loss_coef": 0.1, "weights": mode} for mode in MODES},
    **{f"layer major, {mode}": {"micro": 2, "aux_loss_coef": 0.1, "layer_major": True, "weights": mode} for mode in MODES},
    **{f"not quantized, {mode}": {"quantized": False, "weights": mode} for mode in ("spread", "experts")},
    **{f"all trained, {mode}": {"full": True, "aux_loss_coef": 0.1, "micro": 2, "weights": mode} for mode in ("whole", "experts")},
    **{f"moments, {mode}": {"moments": "spread", "weights": mode} for mode in MODES},
    **{f"experts in host memory, {mode}": {"experts": where, "weights": mode} for where in ("host",) for mode in ("whole", "experts")},
    **{f"3 devices, {mode}": {"devices": 3, "rows": 6, "sizes": TINY | {"num_experts": 15, "intermediate_size": 96}, "weights": mode}
       for mode in MODES},
    "a shared A, experts": {"share": ["w1", "w3"], "weights": "experts"},
    **{f"{preset}, {mode}": {"preset": preset, "sizes": {}, "weights": mode} for mode in MODES
       for preset in ("gpt-oss-tiny", "deepseek-v3-tiny", "qwen3-moe-tiny", "olmoe-tiny")},
    **{f"dropout, {mode}": {"dropout": 0.5, "weights": mode} for mode in MODES},
    **{f"dropout, dense, {mode}": {"dropout": 0.5, "sizes": TINY | {"experts_per_token": 8}, "weights": mode} for mode in ("experts",)},
    **{f"pairs, {loss}, {mode}": {"preference": loss, "micro": 2, "weights": mode} for loss in ("sigmoid", "ipo") for mode in MODES},
    **{f"remat offload, {mode}": {"remat": "offload", "sizes": TINY | {"num_layers": 2}, "weights": mode} for mode in MODES},
    **{f"2 devices, {mode}": {"devices": 2, "dropout": 0.5, "preference": "ipo", "remat": "offload", "weights": mode} for mode in MODES},
    **{f"blackmamba, {mode}": {"preset": "blackmamba-tiny", "sizes": {}, "full": True, "weights": mode} for mode in ("whole", "experts")},
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", GRID)
def test_every_case_is_that_of_one_device(case):
    result = run(BASE | {"evaluated": True} | GRID[case])
    agrees(result)
    (one, weight), (other, there) = result["evaluation"]
    assert abs(one - other) <= 4e-7 * one and weight == there > 0


EIGHT_BITS = {
    **{f"adapters, {mode}": (mode, "whole", {"rank": 64}) for mode in MODES},
    **{f"adapters, in parts, {mode}": (mode, "spread", {"rank": 64}) for mode in MODES},
    **{f"all trained, {mode}": (mode, "whole", {"full": True}) for mode in ("whole", "experts")},
}


@pytest.mark.long
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_moments_in_8_bits(name):
    """Three steps: a code may be another where a gradient's last bit is."""
    mode, moments, more = EIGHT_BITS[name]
    case = BASE | {"optimizer": "adamw_8bit"} | more
    losses, weights, nbytes = trained(case)
    for count in (2, 4):
        devices = mesh.devices(MeshConfig(devices=count, weights=mode, moments=moments))
        found, there, on_device = trained(case, devices)
        assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(losses, found, strict=True))
        off = [np.mean(np.abs(a - b) > 1e-3 * np.abs(a).max()) for a, b in zip(weights, there, strict=True)]
        assert max(off) < 2e-3
        assert (on_device < nbytes) == (mode == "experts" or moments == "spread")


@pytest.mark.long
def test_each_device_drops_by_masks_of_its_own():
    """The key of a device's rows is folded with its number: their gradients are those of one device that has them and this key."""
    case = BASE | {"dropout": 0.5}
    graphdef, trainable, frozen = model_of(case)
    objective, batch = Objective(graphdef, full=False, dropout=0.5), batch_of(4, 16, 1, 64)
    devices = mesh.devices(MeshConfig(devices=2))
    step = make_train_step(objective, gradients_kept(), optax.constant_schedule(1.0), 0, devices)
    given = jax.device_put((trainable, frozen), (devices.of_weights(trainable), devices.of_weights(frozen)))
    state = initial_state(given[0], gradients_kept(), devices)
    after, _ = jax.jit(step)(state, given[1], jax.device_put(batch, devices.of_rows(batch, 1)))

    @jax.jit
    def alone(rows, number):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), number)
        return jax.grad(lambda weights: sums(objective, weights, frozen, rows, key)[0])(trainable)

    parts = [alone(jax.tree.map(lambda a, i=i: a[0, 2 * i : 2 * i + 2], batch), i) for i in range(2)]
    weight = float(np.sum(batch.loss_mask))
    for one, other, found in zip(*map(jax.tree.leaves, (*parts, jax.device_get(after.opt_state))), strict=True):
        expected = np.asarray(one + other) / weight
        assert np.abs(expected - found).max() <= 4e-6 * np.abs(expected).max()


@pytest.mark.long
def test_five_devices():
    sizes = TINY | {"num_experts": 15, "hidden_size": 80, "intermediate_size": 80}
    for result in elsewhere([BASE | {"devices": 5, "rows": 10, "sizes": sizes, "weights": mode} for mode in MODES], 5):
        agrees(result)
