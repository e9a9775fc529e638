"""The ways to train a config on a GPU, by arithmetic."""

from dataclasses import replace

import pytest
from support import ROOT

from moejax import config, gpus
from moejax.estimator import closed_form, links, spread, ways
from moejax.estimator.sizes import architecture_of

MIXTRAL, QWEN3 = "mixtral_8x7b", "qwen3_30b_a3b_24gb"


def asked(name, gpu, *overrides, row_tokens=None):
    experiment = config.load(ROOT / "configs" / f"{name}.yaml", list(overrides))
    sizes = architecture_of(experiment)
    others = tuple(card for card in gpus.GPUS.values() if card.bf16)
    return ways.Asked(experiment.with_defaults(sizes), sizes, gpus.find(gpu), row_tokens or experiment.data.longest_row, others)


def one(found, **wanted):
    """The way with these settings and no other rank."""
    return next(
        w for w in found
        if "adapter.rank" not in w.changes and w.experiment.placement.experts == wanted.get("experts", "device")
        and w.experiment.training.optimizer == wanted.get("optimizer", "adamw")
    )  # fmt: skip


def test_every_way_takes_the_same_step_and_fits_or_says_what_would():
    given = asked(MIXTRAL, "RTX-4090", "data.batch_rows=2", "training.gradient_accumulation=4")
    found = ways.ways(given)
    fitting = [w for w in found if w.refused is None]
    own = [w.seconds for w in fitting if "adapter.rank" not in w.changes]
    assert found[: len(fitting)] == fitting and own == sorted(own) == [w.seconds for w in fitting[: len(own)]]
    for way in found:
        assert way.rows * way.experiment.training.gradient_accumulation == 8
        run = ways.changed(given.experiment, way.changes)
        assert way.experiment.training.remat in ("full", "offload")  # which auto comes down to
        assert way.experiment == run.changed("training", remat=way.experiment.training.remat)
        again = closed_form.on(given.gpu, way.experiment, given.config, way.rows, given.row_tokens)
        assert (again.total, again.host) == (way.peak_bytes, way.host_bytes) and (again.total <= given.limit()) == (way.refused is None)
    on_device, in_host = one(found), one(found, experts="host")
    assert "too much; placement.experts=host would fit" in on_device.refused and in_host.refused is None
    assert in_host.host_bytes == pytest.approx(23.3e9, rel=0.02) and in_host.bus_seconds > 1


def test_between_device_and_host_as_many_layers_as_fit():
    """The most, with its rows; where the bus is not hidden, the fewer bytes cross it, the faster."""
    given = asked(MIXTRAL, "RTX-4090", row_tokens=128)
    found = ways.ways(given)
    split = [w for w in found if isinstance(w.experiment.placement.experts, int)]
    assert {w.experiment.training.optimizer for w in split} == {"adamw", "adamw_8bit"} and found[0] in split
    for way in split:
        n = way.experiment.placement.experts
        more = given.peak(way.experiment.changed("placement", experts=n + 1), way.rows).total
        assert 0 < n < 32 and way.refused is None and way.peak_bytes <= given.limit() < more
        host = one(found, experts="host", optimizer=way.experiment.training.optimizer)
        assert way.seconds < host.seconds and way.host_bytes < host.host_bytes


def test_a_large_card_takes_the_config_as_it_is_first():
    found = ways.ways(asked(MIXTRAL, "H100"))
    assert not found[0].changes and found[0].bus_seconds == 0 and all(w.refused is None for w in found)
    assert one(found, optimizer="adamw_8bit").peak_bytes < found[0].peak_bytes


@pytest.mark.parametrize(
    ("name", "gpu", "row_tokens", "experts", "change"),
    [(MIXTRAL, "RTX-5090", 65536, "device", "rows of "), (QWEN3, "RTX-4070", 1024, "device", "placement.experts=host"),
     (MIXTRAL, "RTX-4060", 16384, "host", " would ")],
)  # fmt: skip
def test_the_smallest_change_is_named_and_fits(name, gpu, row_tokens, experts, change):
    given = asked(name, gpu, row_tokens=row_tokens)
    way = one(ways.ways(given), experts=experts)
    assert way.refused is not None and change in way.refused
    if "rows of" in way.refused:
        length = int(way.refused.partition("rows of ")[2].split()[0])
        assert given.peak(way.experiment, 1, length).total <= given.limit() < given.peak(way.experiment, 1, length + 16).total


def test_a_lower_rank_where_the_configs_does_not_fit():
    several = ("adapter.rank={experts: 64, attention: 32}", "adapter.alpha={experts: 16, attention: 32}", "data.batch_rows=1")
    given = asked(QWEN3, "RTX-4090", *several)
    found = ways.ways(given)
    lower = [w for w in found if "adapter.rank" in w.changes]
    assert lower and all(w.refused is None for w in lower) and one(found).refused is not None
    for way in lower:
        higher = {name: 2 * rank for name, rank in way.experiment.adapter.rank.items()}
        assert given.peak(ways.changed(way.experiment, {"adapter.rank": higher}), 1).total > given.limit()
    assert ways.written({"adapter.rank": {"experts": 4, "attention": 8}}) == "'adapter.rank={experts: 4, attention: 8}'"


def test_full_fine_tuning_and_pairs_have_no_way_that_a_run_refuses():
    found = ways.ways(asked("blackmamba_2.8b", "A40"))
    assert all(w.experiment.placement.experts == "device" and "adapter.rank" not in w.changes for w in found)
    for way in found:
        config.Experiment.model_validate(way.experiment.model_dump())
    for way in ways.ways(asked("dpo_demo", "A40")):
        config.Experiment.model_validate(way.experiment.model_dump())


def test_the_sides_of_a_pair_stay_in_one_micro_batch():
    """Where they are rows of their own: nine rows would fit, and are no way."""
    apart = ("data.batching=pad_longest", "data.batch_rows=6", "training.gradient_accumulation=3", "training.remat=full")
    given = asked("dpo_demo", "A40", *apart)
    room = int(1.02 * given.peak(given.experiment, 9).total + 0.3e9)  # of which the closed form leaves 0.3 GB free
    found = ways.ways(replace(given, gpu=replace(given.gpu, usable_bytes=room)))
    assert all(way.rows % 2 == 0 and way.refused is None for way in found) and any(way.rows == 6 for way in found)


def test_several_cards():
    """What does not fit whole fits in parts; the step is the same; what goes between devices is in its seconds."""
    given = asked(MIXTRAL, "L4", "data.batch_rows=4", "mesh.devices=2", "training.optimizer=lion", row_tokens=1024)
    given = replace(given, link=links.between(given.gpu, 2))
    found = ways.ways(given)
    fits = {(w.experiment.mesh.weights, w.experiment.placement.experts) for w in found if w.refused is None}
    assert {("spread", "device"), ("experts", "device"), ("experts", "host"), ("whole", "host")} <= fits and ("whole", "device") not in fits
    assert not any(weights == "spread" and place != "device" for weights, place in fits)
    for way in found:
        total = way.experiment.training.gradient_accumulation * way.rows
        assert total == 4 and way.rows % 2 == 0
        moved = spread.traffic(way.experiment, given.config, way.rows * 1024).total
        assert way.link_seconds == pytest.approx(moved / 25.2e9) and way.seconds > way.link_seconds > 0
    assert "with one row on each" in next(w.refused for w in found if w.refused is not None)
    on_device = [w for w in found if w.host_bytes == 0]
    by_expert, by_rows = (next(w for w in on_device if w.experiment.mesh.weights == name) for name in ("experts", "spread"))
    assert by_expert.link_seconds < by_rows.link_seconds  # of 2,048 tokens a device: docs/several_gpus.md
    assert by_expert.compute_seconds < by_rows.compute_seconds  # half as many experts are dequantized
