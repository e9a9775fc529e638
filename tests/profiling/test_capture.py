"""Traced steps: what is written where, and what a trace leaves alone."""

import contextlib
import json
import re
import signal
from itertools import pairwise
from pathlib import Path

import jax
import pytest

from moejax import cli, config
from moejax.errors import UserError
from moejax.profiling import breakdown, capture, label, schema, xplane
from moejax.training import loop
from moejax.training.loop import Trainer

STEPS = 8
WINDOW = {"start_step": 3, "steps": 2}
# A constant rate: runs of other lengths are the same program.
SMALL = {"training": {"steps": STEPS, "gradient_accumulation": 1, "schedule": "constant"}}


def folder_of(experiment):
    return Path(experiment.runs_dir) / experiment.name


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def plain(session_experiment):
    """A run without a profile section."""
    experiment = session_experiment("plain", **SMALL)
    assert loop.run(experiment, resume=False) == 0
    return folder_of(experiment)


@pytest.fixture(scope="session")
def trace(profiled):
    return xplane.read(xplane.find(profiled.folder))


def test_the_steps_asked_for_are_in_the_trace(profiled, trace):
    assert [s.number for s in trace.steps] == [3, 4]
    assert xplane.find(profiled.folder).parent.parent == profiled.folder / "plugins" / "profile"
    assert trace.compiled == []
    for one, other in zip(trace.steps, trace.steps[1:], strict=False):
        assert one.end <= other.start
    for event in trace.events:  # each step is waited for before its marker closes
        assert any(s.start <= event.start and event.end <= s.end for s in trace.steps)


def test_our_scopes_are_in_the_trace(trace):
    run = {(e.program, e.instruction) for e in trace.events}
    paths = [
        i.metadata.op_name
        for number, module in trace.programs.items()
        for c in module.computations
        for i in c.instructions
        if (number, i.name) in run
    ]
    for scope in ("attention", "moe/router", "moe/.*/w1", "moe/.*/w2_dequant", "moe/combine", "loss", "optimizer"):
        assert any(re.search(rf"[/(]{scope}[/)]", path) for path in paths), scope


def test_labels_change_nothing_but_the_viewers_names(profiled, trace, tmp_path):
    """The file that the run left is labelled: every instruction of the step that ran, and a second time changes no byte."""
    path = tmp_path / "again.xplane.pb"
    path.write_bytes(xplane.find(profiled.folder).read_bytes())
    assert label.label(path, trace, "jit_step") > 100
    assert path.read_bytes() == xplane.find(profiled.folder).read_bytes()
    (host,) = [p for p in xplane.MESSAGES["XSpace"].FromString(path.read_bytes()).planes if p.name == "/host:CPU"]
    shown = {entry.name: entry.display_name for entry in host.event_metadata.values()}
    step = {n for n, m in trace.programs.items() if m.name == "jit_step"}
    assert all(shown[e.instruction].endswith(f": {e.instruction}") for e in trace.events if e.program in step)
    assert any(name.startswith("moe/w1 backward: ") for name in shown.values())


def test_a_line_of_phases_and_one_of_layers_stand_above_the_threads(profiled, trace, tmp_path, monkeypatch):
    def plane_of(path):
        planes = xplane.MESSAGES["XSpace"].FromString(path.read_bytes()).planes
        (plane,) = [plane for plane in planes if plane.name == label.PLANE]
        return plane, {line.name: [plane.event_metadata[e.metadata_id].name for e in line.events] for line in plane.lines}

    plane, shown = plane_of(xplane.find(profiled.folder))
    phases = [name for name in shown["phase"] if name in ("forward", "backward", "optimizer")]
    assert set(phases) == {"forward", "backward", "optimizer"} and phases.index("forward") < phases.index("optimizer")
    # Blocks of any length: where other processes hold a step up, all of a kind may be shorter than what is shown.
    path = tmp_path / "all.xplane.pb"
    path.write_bytes(xplane.find(profiled.folder).read_bytes())
    monkeypatch.setattr(label, "SHORTEST", 10**12)
    label.label(path, trace, "jit_step")
    kinds = set(plane_of(path)[1]["kind of layer"])
    assert {"attention", "moe", "loss", "optimizer"} <= kinds and set(shown["kind of layer"]) <= kinds
    for line in plane.lines:
        ends = [(e.offset_ps, e.offset_ps + e.duration_ps) for e in line.events]
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))


def test_a_block_is_a_run_of_one_name():
    events = [(0, 4, "forward"), (3, 6, "forward"), (5, 9, "other"), (7, 8, "backward"), (8, 9, "forward")]
    assert label.blocks(events) == [(0, 6, "forward"), (7, 8, "backward"), (8, 9, "forward")]
    assert label.blocks([(0, 9, "a"), (5, 8, "b")]) == [(0, 5, "a"), (5, 8, "b")]
    assert label.blocks([(0, 9, "a"), (9, 10, "b"), (10, 20, "a")], 2) == [(0, 20, "a")]


def test_tracing_changes_no_number(profiled, plain):
    ours, others = records(profiled.folder), records(plain)
    for name in ("loss", "grad_norm", "update_norm", "param_norm", "learning_rate", "expert_counts"):
        assert [r[name] for r in ours] == [r[name] for r in others]
    assert adapter(profiled.folder) == adapter(plain)


def test_off_writes_nothing(plain):
    assert not (plain / "plugins").exists() and not (plain / schema.FILE_NAME).exists()
    assert config.load(plain / "config.yaml").profile is None


def test_step_profile(profiled):
    profile, steps = schema.read(profiled.folder), records(profiled.folder)
    assert (profile.framework, profile.method, profile.precision, profile.remat) == ("jax", "qlora", "float32", "full")
    assert profile.moe == schema.Moe(experts=4, top_k=2, backend="loop")
    # Step 1 compiles, 3 and 4 are traced, the trace is written in 5.
    counted = sorted(r["step_seconds"] for r in steps if r["step"] in (2, 6, 7, 8))
    assert profile.step_seconds.n == len(counted)
    assert profile.step_seconds.median == pytest.approx((counted[1] + counted[2]) / 2)
    traced = [r for r in steps if r["step"] in (3, 4)]
    assert (profile.batch.rows, profile.batch.row_tokens, profile.batch.tokens) == (4, 64, 256)
    for name in ("queries", "real_tokens", "supervised_tokens"):
        assert getattr(profile.batch, name) == (traced[0][name] + traced[1][name]) / 2
    assert set(profile.expert_load) == {"0", "1"}
    for layer, load in profile.expert_load.items():
        a, b = (r["expert_counts"][int(layer)] for r in traced)
        assert load == [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        assert sum(load) == 2 * profile.batch.real_tokens
    assert 0 < profile.model.params_active < profile.model.params_total
    assert profile.model.params_trainable > 0
    assert profile.memory.compiler_peak_bytes >= profile.memory.arguments_bytes > 0
    assert profile.device.peaks_measured and profile.device.peak_flops > 0 and profile.device.peak_bytes_per_second > 0
    phases = profile.phases.model_dump()
    assert all(phases[name] > 0 for name in ("forward", "recompute", "backward", "optimizer"))
    assert {"moe", "attention"} <= set(profile.layers) and any(k.startswith("moe/w1") for k in profile.moe_kernels)
    assert sum(c.flops for c in profile.cost.values()) > 0


def test_the_end_says_where_to_look(profiled):
    for text in ("median of 4 untraced", f"moejax breakdown {profiled.folder}", schema.FILE_NAME):
        assert text in profiled.output


def test_a_missing_plugin_is_said(monkeypatch):
    monkeypatch.setattr(capture.installation, "version", lambda name: None)
    assert "-m pip install 'xprof" in capture.plugin_hint()
    monkeypatch.setattr(capture.installation, "version", lambda name: "2.24")
    assert capture.plugin_hint() is None


@pytest.fixture
def cached(session_experiment, monkeypatch):
    """For tests that do not ask what is in a trace: the program may come from the cache."""
    monkeypatch.setattr(capture, "whole_programs", contextlib.nullcontext)


def test_stopped_inside_the_window(session_experiment, cached, monkeypatch, capsys):
    """The trace is closed and whole; the run resumes, and says that nothing more is traced."""
    experiment = session_experiment("stopped", **SMALL, profile={"start_step": 3, "steps": 4})
    step = capture.Capture.step

    def and_stop(self, number):
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(capture.Capture, "step", and_stop)
        assert loop.run(experiment, resume=False) == 128 + signal.SIGTERM
    assert "stopped after 2 of 4 traced steps" in capsys.readouterr().out
    folder = folder_of(experiment)
    assert [s.number for s in xplane.read(xplane.find(folder)).steps] == [3, 4]
    assert not (folder / schema.FILE_NAME).exists()
    assert loop.run(experiment, resume=True) == 0
    assert "nothing was traced: steps 3 to 6 were past" in capsys.readouterr().out
    assert len(list(folder.glob("plugins/profile/*"))) == 1


def test_an_error_inside_the_window_closes_the_trace(session_experiment, cached, monkeypatch):
    """The next run of the process can trace again."""
    experiment = session_experiment("broken", **SMALL, profile=WINDOW)
    finish = Trainer._finish

    def fail(self, pending):
        finish(self, pending)
        if pending.step == 3:
            raise UserError("stopped")

    monkeypatch.setattr(Trainer, "_finish", fail)
    with pytest.raises(UserError, match="stopped"):
        loop.run(experiment, resume=False)
    assert [s.number for s in xplane.read(xplane.find(folder_of(experiment))).steps] == [3]


@pytest.mark.long
def test_a_new_shape_inside_the_window(session_experiment, cached, tmp_path, capsys):
    """With padded rows a later step may compile: the run ends well, and says why there is no profile."""
    records = [{"instruction": "One " * n, "output": "two"} for n in [20] * 8 + [2] * 4]  # the longest is compiled at the start
    (tmp_path / "lengths.json").write_text(json.dumps(records))
    data = {"source": str(tmp_path / "lengths.json"), "holdout": 0, "shuffle": False}
    experiment = session_experiment(
        "padded",
        **SMALL | {"training": SMALL["training"] | {"steps": 3, "learning_rate": 3e-3}},  # of no other test: it has to compile
        data=data | {"batching": "pad_bucket", "buckets": [64, 128], "max_length": 128},
        profile={"start_step": 2, "steps": 2},
    )
    assert loop.run(experiment, resume=False) == 0
    assert "compiled while the trace was taken" in capsys.readouterr().out
    assert not (folder_of(experiment) / schema.FILE_NAME).exists()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("{start_step: 1}", "start_step = 1: step 1 compiles and cannot be traced: expected 2 or more"),
        ("{steps: 0}", "steps = 0: expected 1 or more"),
        ("{start_step: 7, steps: 3}", "profile traces steps 7 to 9, but the run has 8: lower profile.start_step"),
        ("{start: 7}", "unknown key profile.start: did you mean start_step"),
        ("5", "profile = 5"),
    ],
)
def test_windows_that_cannot_be(profile, message, session_experiment, tmp_path, capsys):
    experiment = session_experiment("never", **SMALL)
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(experiment))
    assert cli.main(["train", "--config", str(path), f"profile={profile}"]) == 2
    assert message in capsys.readouterr().err
    assert not folder_of(experiment).exists()


def test_a_window_beyond_the_epochs(session_experiment):
    """Their steps are known when the data is read: still before anything is written."""
    experiment = session_experiment("epochs", training={"steps": None, "epochs": 1}, profile={"start_step": 5000})
    with pytest.raises(UserError, match=r"profile traces steps 5000 to 5002, but the run has \d+:"):
        loop.run(experiment, resume=False)
    assert not folder_of(experiment).exists()


def test_moejax_profile(session_experiment, tmp_path, capsys):
    """Just the steps that are needed, in a folder of its own, without checkpoints or weights; never overwritten."""
    experiment = session_experiment("short", **SMALL | {"training": SMALL["training"] | {"eval_every": 2, "warmup_steps": 4}})
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(experiment))
    arguments = ["profile", str(path), "profile.start_step=2", "profile.steps=2"]
    assert cli.main(arguments) == 0
    folder = Path(experiment.runs_dir) / "short-profile"
    assert len(records(folder)) == 2 + 2 - 1 + 1 + config.UNTRACED_STEPS
    assert schema.read(folder).step_seconds.n == config.UNTRACED_STEPS
    assert not (folder / "adapter").exists() and not any((folder / "checkpoints").glob("*"))
    assert f"moejax breakdown {folder}" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.long
def test_latent_attention_shared_experts_and_a_dense_layer(session_experiment, tmp_path, capsys):
    """`moejax profile` over NF4, and what `moejax breakdown` reads in its trace: each has its stages, in every phase."""
    sizes = dict(
        num_layers=3, num_heads=2, num_kv_heads=2, num_experts=4, experts_per_token=2, hidden_size=64, intermediate_size=48, dense_size=96,
        head_dim=8, qk_nope_head_dim=16, v_head_dim=24, kv_lora_rank=32,
    )  # fmt: skip
    targets = ["q_proj", "kv_a_proj", "kv_b_proj", "o_proj", "w1", "w2", "w3", "shared_w1", "dense_w1"]
    model = {"preset": "deepseek-v3-tiny", "overrides": sizes, "aux_loss_coef": 0.0}
    experiment = session_experiment("latent", **SMALL, model=model, adapter={"rank": 2, "alpha": 4.0, "targets": targets})
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(experiment))
    assert cli.main(["profile", str(path), "profile.start_step=2", "profile.steps=2"]) == 0
    folder = Path(experiment.runs_dir) / "latent-profile"
    stages = {
        "attention", "attention/dequant", "attention/norm", "attention/lora", "mlp", "mlp/dequant", "mlp/lora", "moe/shared",
        "moe/shared_dequant",
    }  # fmt: skip
    found = breakdown.analyze(xplane.read(xplane.find(folder)))
    for phase in ("forward", "recompute", "backward"):
        spent = found.sums("stage", phase)
        assert all(spent.get(stage, 0) > 0 for stage in stages), (phase, stages - spent.keys())
    assert schema.read(folder).expert_load.keys() == {"1", "2"}  # the first layer has no experts
    capsys.readouterr()
    assert cli.main(["breakdown", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in stages)


def test_what_a_profiled_run_is_made_of(session_experiment, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(session_experiment("made", **SMALL)))
    plain = config.load_profiled(path)
    assert (plain.name, plain.profile, plain.training.steps) == ("made-profile", config.ProfileConfig(), 13)
    named = config.load_profiled(path, ["name=mine", "training.steps=20", "profile={start_step: 9}"])
    assert (named.name, named.profile.start_step, named.profile.steps, named.training.steps) == ("mine", 9, 3, 20)
    with pytest.raises(UserError, match="but the run has 6"):
        config.load_profiled(path, ["training.steps=6"])
    with pytest.raises(SystemExit):
        cli.main(["profile", "--help"])
    assert "NAME-profile, or as name=… says" in " ".join(capsys.readouterr().out.split())


def test_cuda_graphs_are_off_for_a_profiled_program():
    assert capture.compiler_options("gpu") == {"xla_gpu_enable_command_buffer": ""}
    assert capture.compiler_options("cpu") is None


def test_a_profiled_program_does_not_come_from_the_cache(session_experiment, profiled, trace):
    """jax keeps no instructions of what it reads from its cache on disk: the trace would say nothing of the step."""
    assert any(module.name == "jit_step" for module in trace.programs.values())
    assert jax.config.jax_enable_compilation_cache
    with capture.whole_programs():
        assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache
