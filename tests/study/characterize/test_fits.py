"""What is computed from the trials: costs of the config's whole run, equation 1's sizes; trials' facts are made up here."""

import dataclasses
import json

import pytest
from small_study import ENVIRONMENT, SIZES, write_config
from support import ROOT

from moejax.errors import UserError
from moejax.estimator import prices
from moejax.study.characterize import fits, plan, result, study
from moejax.study.report import results
from moejax.study.report.results import MemoryLimit

H100 = dataclasses.replace(ENVIRONMENT, device="NVIDIA H100 80GB HBM3", platform="gpu")
SIZES = [*SIZES, "sweep.routings=[sparse, dense]", "sweep.batches=[1, 2, 4, largest]"]


def seconds(queries, share):
    """Of a step: 0.2 s, and per query of 48 tokens 0.1 s and for the experts 0.05 s times their share."""
    return 0.2 + queries * (0.1 + 0.05 * share)


@pytest.fixture
def fitted(tmp_path):
    """fitted(kind, limit, **config) -> (study, the outcome of its fit or cost) on trials of 1, 2, 4 and 8 queries a step."""

    def make(kind, limit=80 * 10**9, overrides=(), **config):
        wanted = study.resolve(None, [write_config(tmp_path, **config)], [*SIZES, *overrides], limit, False)
        tasks = plan.tasks(wanted)
        for task in tasks:
            if task.kind == "throughput" and task.batching == "pad_longest":
                queries = 8 if task.batch == "largest" else task.batch
                share = task.setting.architecture.experts_per_token / 4
                peak = int(10e9 + queries * 1e9 * (1 + share))
                facts = {
                    "queries": float(queries), "tokens": 48.0 * queries, "peak_tokens": 48 * queries, "seconds": seconds(queries, share),
                    "peak_bytes": peak, "argument_bytes": 10**10, "routing": task.setting.routing,
                }  # fmt: skip
                result.keep(result.path_of(tmp_path, task.name), result.Result("done", None, 1.0, "", [], facts))
        content = results.Study(
            1, None, "a command", "2026-11-27", wanted.config(), "", wanted.models(), H100, MemoryLimit(limit, True), [], {}, False
        )
        task = next(t for t in tasks if t.kind == kind)
        return wanted, fits.run(task, wanted, content, tmp_path)

    return make


def test_the_cost_is_of_the_whole_run(fitted, tmp_path):
    """All epochs of the records that are trained on, at the fastest batch; dollars by the price that is named."""
    records = len(json.loads((ROOT / "assets/problems/test.json").read_text()))
    _, outcome = fitted("cost", data={"holdout": 50}, training={"epochs": 3})
    for routing, share in (("sparse", 0.5), ("dense", 1.0)):
        here = {r.metric: r for r in outcome.rows if (r.scope, r.routing) == ("H100", routing)}
        assert here["queries"].value == 3 * (records - 50) and here["measured"].value == 1 and here["batch"].value == 8
        rate = 8 / seconds(8, share)
        assert here["queries_per_second"].value == pytest.approx(rate, rel=1e-12)
        hours = 3 * (records - 50) / rate / 3600
        assert here["hours"].value == pytest.approx(hours, rel=1e-12) and here["hours"].unit == "h"
        price = prices.cheapest(prices.SETS["2026"], "H100")
        assert here["usd"].value == here["hours"].value * price.usd_per_hour and here["usd"].unit == "USD"
        assert outcome.facts["prices"]["H100"] == f"{price.seller}, {price.day}"
    others = {r.scope for r in outcome.rows} - {"H100"}
    assert others and others | {"H100"} == set(outcome.facts["prices"])
    for gpu in others:
        own = {r.metric: r.value for r in outcome.rows if (r.scope, r.routing) == (gpu, "sparse")}
        assert own["measured"] == 0 and own["usd"] == own["hours"] * own["usd_per_hour"]
        assert own["hours"] == pytest.approx(own["queries"] / own["queries_per_second"] / 3600, rel=1e-12)


def test_steps_win_over_epochs(fitted):
    """4 micro-batches of 2 padded queries a step."""
    rows = {"batching": "pad_longest", "batch_rows": 2}
    wanted, _ = fitted("cost", data=rows, training={"epochs": 3, "steps": 10, "gradient_accumulation": 4})
    assert {s.run_queries for s in wanted.settings} == {10 * 4 * 2}


def test_a_limit_that_is_one_of_figure_13s_sizes_stands_there_once(fitted):
    _, outcome = fitted("fit", limit=40 * 10**9)
    for routing in ("sparse", "dense"):
        scopes = [r.scope for r in outcome.rows if (r.metric, r.routing) == ("predicted_batch", routing)]
        assert scopes == ["40 GB", "24 GB", "48 GB", "80 GB", "100 GB", "120 GB"]


def test_the_studys_lengths_are_for_its_own_sets():
    """By their whole names; cut where the config says, and nowhere else."""
    sources = ("a/commonsense_15k.json", "math_14k", "data/math_of_mine.json", "acme/commonsense-long", "assets/problems/train.json", None)
    assert [study._data_label(source) for source in sources] == ["cs", "math", "other", "other", "problems", "fixed"]
    config = str(ROOT / "configs" / "mixtral_8x7b_math_sparse.yaml")
    made = {n: study.resolve(None, [config], [f"data.max_length={n}"], None, False).settings[0] for n in (512, 2048)}
    assert made[512].longest == 512 and 1024 < made[2048].longest <= 2048
    assert max(len(q.ids) for q in made[2048].queries(20_000)) > 1024
    with pytest.raises(UserError, match=r"data\.source = data/math_of_mine\.json is no file here"):
        study.resolve(None, [config], ["data.source=data/math_of_mine.json"], None, False)
