"""Characterizations with made-up numbers (device "made-up GPU"): every experiment, for two models, without running any."""

import math

from moejax.study.report.results import Environment, MemoryLimit, Model, Planned, Row, Study, Trial, digest

MODELS = (("mixtral-made", "mixtral", "qlora"), ("blackmamba-made", "blackmamba", "full"))
LARGEST = {"sparse": 8, "dense": 3}
LENGTHS = (64, 128, 256, 512, 1024)


def study(device="made-up GPU", speed=1.0, largest=LARGEST, versions=None, finished=True, config=None, models=MODELS, experts=8):
    """A whole study. speed: how much faster than 1 its steps are."""
    rows, trials, plan = [], {}, []

    def trial(name, experiment, values, status="done", message=None):
        command = f"moejax characterize --preset made-up --out DIR --only {name}"
        plan.append(Planned(name, experiment, 10.0, command))
        trials[name] = Trial(status, 12.5 if status != "pending" else None, message, command)
        rows.extend(Row(name, experiment, *row) for row in values)

    for model, family, method in models:
        for routing, most in largest.items():
            setting = (model, method, routing)
            for data in ("cs", "math"):
                here = (*setting, data, "pad_longest", 1024)
                trial(f"largest-{model}-{routing}-{data}", "largest_batch", [
                    (*here, None, "", "predicted_batch", most, "queries"),
                    (*here, None, "", "proved_batch", most, "queries"),
                    (*here, None, "", "failed_batch", most + 1, "queries"),
                    (*here, most, "", "peak_bytes", 47_123_456_789, "bytes"),
                    (*here, None, "device", "memory_limit", 48_000_000_000, "bytes"),
                ])  # fmt: skip
                for batch in range(1, most + 1):
                    seconds = (0.3 + 0.2 * batch * (1 if routing == "sparse" else 2.5)) / speed
                    at = (*here, batch, "")
                    trial(f"throughput-{model}-{routing}-{data}-{batch}", "throughput", [
                        (*at, "queries_per_second", batch / seconds, "queries/s"),
                        (*at, "tokens_per_second", 79.3 * batch / seconds, "tokens/s"),
                        (*at, "step_seconds", seconds, "s"),
                        (*at, "padded_share", 1 - 1 / math.sqrt(batch), "share"),
                    ])  # fmt: skip
                packed = (*setting, data, "pack", 1024, most + 0.37, "")
                rate = 1.31 * speed * most / (1 if routing == "sparse" else 2.5)
                trial(f"throughput-{model}-{routing}-{data}-pack", "throughput", [(*packed, "queries_per_second", rate, "queries/s")])
            for batch in sorted({1, most, *([largest["dense"]] if routing == "sparse" and "dense" in largest else [])}):
                _breakdown(trial, (*setting, "fixed", "fixed", 128, batch), family, speed)
            _lengths(trial, setting, most, speed)
        for data in ("cs", "math"):
            _load(trial, (model, method, "sparse", data, "pad_longest", 1024, None), experts)
        _fits(trial, model, method, largest, speed)
    known = [Model(name, family, method, "random", 2_300_000) for name, family, method in models]
    config = config or {"preset": "made-up", "moe": {"backend": "auto"}, "lengths": list(LENGTHS)}
    versions = versions or {"python": "3.12.1", "jax": "0.11.0", "jaxlib": "0.11.0", "flax": "0.12.0", "moejax": "0.1.0"}
    environment = Environment(device, "gpu", 48_000_000_000, 1.5e14, 6.96e11, "tabled", versions, "made-up CPU", "abc1234", "f00d")
    return Study(
        1, "made-up", "moejax characterize --preset made-up --out DIR", "2026-11-25T12:00:00Z", config, digest(config), known,
        environment, MemoryLimit(48_000_000_000, False), plan, trials, finished, rows,
        prices={"A40": "made-up seller, 2026-11-01", "A100-80": "made-up seller, 2026-11-01"},
    )  # fmt: skip


def _breakdown(trial, at, family, speed):
    model, routing, batch = at[0], at[2], at[6]
    name, scale = f"{model}-{routing}-{batch}", (0.2 + 0.1 * batch) / speed
    phases = {"forward": 0.9, "recompute": 0.8, "backward": 1.9, "optimizer": 0.2, "other": 0.05, "idle": 0.02}
    trial(f"stages-{name}", "stages", [(*at, k, "seconds", v * scale, "s") for k, v in phases.items()])
    mixer = "mamba" if family == "blackmamba" else "attention"
    layers = {mixer: 0.6, "moe": 2.4, "norm": 0.1, "embed": 0.03, "loss": 0.2, "optimizer": 0.2, "other": 0.05}
    trial(f"layers-{name}", "layers", [(*at, k, "seconds", v * scale, "s") for k, v in layers.items()])
    kernels = {"moe/w1": 0.5, "moe/w2": 0.45, "moe/router": 0.02, "moe/topk": 0.03, "moe/act": 0.1, "moe/dispatch": 0.2, "moe": 0.05}
    if family != "blackmamba":
        kernels |= {"moe/w3": 0.5, "moe/w1_dequant": 0.2, "moe/w2_dequant": 0.2, "moe/w3_dequant": 0.2, "moe/router_dequant": 0.01}
        kernels |= {"moe/lora": 0.1}
    trial(f"kernels-{name}", "kernels", [(*at, k, "seconds", v * scale, "s") for k, v in kernels.items()])
    used = []
    for i, kernel in enumerate([*kernels, "moe (time-weighted)", "step (time-weighted)"]):
        used.append((*at, kernel, "compute_utilization", 0.9 / (1 + i) * (1 - 0.4 / batch), "share"))
        used.append((*at, kernel, "memory_utilization", 0.3 + 0.04 * i, "share"))
    trial(f"utilization-{name}", "utilization", used)


def _lengths(trial, setting, most, speed):
    for length in LENGTHS:
        batch = max(1, most * 128 // length)
        at = (*setting, "fixed", "fixed", length, batch)
        values = [(*at, "", "step_seconds", (0.4 + batch * length / 900) / speed, "s")]
        for scope in ("step (time-weighted)", "moe (time-weighted)"):
            values += [(*at, scope, "compute_utilization", 0.31 + length / 5000, "share")]
            values += [(*at, scope, "memory_utilization", 0.52 - length / 5000, "share")]
        trial(f"length-{setting[0]}-{setting[2]}-{length}", "length", values)


def _load(trial, at, experts):
    values = []
    for when, skew in (("before", 1.0), ("after", 2.0)):
        counts = [20.5 + skew * ((5 * expert) % 8) for expert in range(experts)]
        mean = sum(counts) / experts
        for expert, tokens in enumerate(counts):
            values.append((*at, f"{when}/{expert}", "tokens_per_query", tokens, "tokens/query"))
            values.append((*at, f"{when}/{expert}", "share", tokens / sum(counts), "share"))
        values.append((*at, when, "variance", sum((c - mean) ** 2 for c in counts) / experts, "(tokens/query)^2"))
        values.append((*at, when, "largest_share", max(counts) / sum(counts), "share"))
    trial(f"expert_load-{at[0]}-{at[3]}", "expert_load", values)


def _fits(trial, model, method, largest, speed):
    whole = (model, method, None, None, None, None, None)
    values = [(*whole, "", metric, value, unit) for metric, value, unit in (
        ("c0", 61.7, "tokens/GB"), ("c1", 0.887, "share"), ("model_gb", 23.4, "GB"), ("rmse_gb", 0.41, "GB"), ("points", 12, "points"),
    )]  # fmt: skip
    for routing, most in largest.items():
        for data in ("cs", "math"):
            for gb, batch in ((24, most // 2), (48, most + 1), (80, 2 * most)):
                at = (model, method, routing, data, "fixed", 1024, None)
                values.append((*at, f"{gb} GB", "predicted_batch", batch, "queries"))
    trial(f"fit_batch-{model}", "fit_batch", values)
    ours = (model, method, None, None, None, None, None)
    values = [(*ours, "moejax", k, v, u) for k, v, u in (
        ("t0_seconds", 0.301, "s"), ("token_seconds", 1.2e-4, "s"), ("expert_token_seconds", 9.1e-4, "s"), ("rmse", 0.021, "queries/s"),
        ("mean_error", 0.0132, "share"), ("points", 11, "points"),
    )]  # fmt: skip
    trial(f"fit_throughput-{model}", "fit_throughput", values)
    for data in ("cs", "math"):
        here = (model, method, None, data, "pad_longest", 1024, None)
        values = []
        for scope in ("equation 2 (printed)", "equation 2 (fitted)"):
            values += [(*here, scope, k, v, u) for k, v, u in (
                ("c2", 0.71, "queries/s"), ("c3", 1.8, "1"), ("c4", 0.55, "queries/s"), ("rmse", 0.213, "queries/s"),
                ("points", 11, "points"),
            )]  # fmt: skip
        trial(f"fit_throughput-{model}-{data}", "fit_throughput", values)
        values = []
        for gpu, usd_per_hour, measured in (("A40", 0.79, 1), ("A100-80", 1.67, 0), ("H100", 2.1, 0)):
            rate = 1.4 * speed * (1 if measured else 2.2)
            hours = 150_000 / rate / 3600
            at = (model, method, "sparse", data, "pad_longest", 1024, largest["sparse"], gpu)
            values += [(*at, k, v, u) for k, v, u in (
                ("batch", largest["sparse"], "queries"), ("queries_per_second", rate, "queries/s"), ("usd_per_hour", usd_per_hour, "USD/h"),
                ("hours", hours, "h"),
                ("queries", 150_000, "queries"), ("usd", hours * usd_per_hour, "USD"), ("measured", measured, "1 or 0"),
            )]  # fmt: skip
        trial(f"cost-{model}-{data}", "cost", values)
