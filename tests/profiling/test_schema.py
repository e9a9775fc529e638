"""step_profile.json: the frozen fields, round trips, and what is refused with which words."""

import copy
import json
import subprocess
import sys

import pytest
from support import ROOT

from moejax.documents import unsealed
from moejax.errors import UserError
from moejax.profiling import schema, scopes

# As frozen in version 2: a name that changes here breaks every reader.
FIELDS = {
    "schema_version": 2,
    "framework": "jax",
    "versions": {"jax": "0.10.2"},
    "device": {"name": "A40", "memory_bytes": 48_000_000_000, "peak_flops": 149.7e12, "peak_bytes_per_second": 696e9,
               "peaks_measured": False},
    "model": {"name": "mixtral", "params_total": 100, "params_active": 40, "params_trainable": 5},
    "method": "qlora",
    "precision": "bfloat16",
    "remat": "full",
    "moe": {"experts": 2, "top_k": 1, "backend": "loop"},
    "batch": {"batching": "pack", "rows": 8, "row_tokens": 64, "queries": 11.5, "tokens": 512, "real_tokens": 500,
              "supervised_tokens": 200},
    "step_seconds": {"median": 0.5, "p10": 0.4, "p90": 0.6, "n": 5},
    "compile_seconds": 3.5,
    "memory": {"compiler_peak_bytes": 4, "measured_peak_bytes": 3, "arguments_bytes": 2, "temporaries_bytes": 1},
    "phases": {"forward": 0.1, "recompute": 0.1, "backward": 0.2, "optimizer": 0.05, "other": 0.0, "collectives": 0.01, "idle": 0.05},
    "layers": {"attention": 0.1, "moe": 0.3},
    "moe_kernels": {"moe/w1": 0.1},
    "cost": {"moe/w1": {"flops": 1e9, "bytes": 1e6}},
    "expert_load": {"0": [10.0, 20.5]},
    "devices": 4,
    "mode": "experts",
    "collectives": {"all-gather": {"count": 6.0, "bytes": 1e6, "exposed_seconds": 0.01, "overlapped_seconds": 0.002}},
}  # fmt: skip


def test_round_trip(tmp_path):
    profile = schema.StepProfile.model_validate(copy.deepcopy(FIELDS))
    path = tmp_path / schema.FILE_NAME
    schema.write(profile, path)
    assert unsealed(json.loads(path.read_text()), "") == FIELDS
    assert schema.read(path) == schema.read(tmp_path) == profile
    assert [p.name for p in tmp_path.iterdir()] == [schema.FILE_NAME]


def test_exactly_these_fields():
    assert list(schema.StepProfile.model_fields) == list(FIELDS)
    for name, value in FIELDS.items():
        if isinstance(value, dict):
            for part in value:
                content = copy.deepcopy(FIELDS)
                del content[name][part]
                fixed = name not in ("versions", "layers", "moe_kernels", "cost", "expert_load", "collectives")
                if fixed:
                    with pytest.raises(ValueError, match=part):
                        schema.StepProfile.model_validate(content)
    assert tuple(schema.Phases.model_fields) == (*scopes.PHASES, scopes.COLLECTIVES, "idle")


def test_version_1_is_of_one_device(tmp_path):
    old = {key: value for key, value in FIELDS.items() if key not in ("devices", "mode", "collectives")} | {"schema_version": 1}
    old["phases"] = {key: value for key, value in FIELDS["phases"].items() if key != "collectives"}
    path = tmp_path / schema.FILE_NAME
    path.write_text(json.dumps(old))
    found = schema.read(path)
    assert (found.devices, found.mode, found.collectives, found.phases.collectives) == (1, None, {}, 0.0)
    assert found.phases.backward == 0.2 and found.expert_load == FIELDS["expert_load"]
    path.write_text(json.dumps(old | {"phases": None}))
    assert schema.read(path).phases is None


def test_unknown_values_are_null():
    nulls = {
        "precision": None, "remat": None, "compile_seconds": None, "phases": None, "layers": None, "moe_kernels": None,
        "cost": None, "expert_load": None, "mode": None, "collectives": None,
        "step_seconds": {"median": None, "p10": None, "p90": None, "n": 0},
    }  # fmt: skip
    assert schema.StepProfile.model_validate(FIELDS | nulls).phases is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("device"), r"device is missing \(null where"),
        (lambda c: c["batch"].pop("queries"), r"batch\.queries is missing"),
        (lambda c: c.update(speed=1), "unknown field speed"),
        (lambda c: c["phases"].update(warmup=1), r"unknown field phases\.warmup"),
        (lambda c: c["batch"].update(rows="8"), r"batch\.rows = '8'"),
        (lambda c: c["phases"].update(forward=-1), r"phases\.forward = -1"),
        (lambda c: c["moe"].update(experts=True), r"moe\.experts = True"),
        (lambda c: c["step_seconds"].update(median=float("nan")), r"step_seconds\.median = nan"),
        (lambda c: c.update(method="dora"), "method = 'dora'"),
        (lambda c: c.update(framework="tensorflow"), "framework = 'tensorflow'"),
        (lambda c: c.update(schema_version=3), "schema_version = 3, this moejax reads versions 1 to 2"),
        (lambda c: c.update(schema_version="1"), "schema_version = '1', this moejax reads versions 1 to 2"),
        (lambda c: c.pop("schema_version"), "schema_version is missing, this moejax reads versions 1 to 2"),
        (lambda c: c.update(devices=0), "devices = 0"),
    ],
)
def test_refused_by_name(change, message, tmp_path):
    content = copy.deepcopy(FIELDS)
    change(content)
    path = tmp_path / "step_profile.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as refusal:
        schema.read(path)
    assert str(path) in str(refusal.value) and "moejax profile" in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (json.dumps(FIELDS, indent=1).encode()[:-40], r"line \d+: no whole JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_no_whole_file(content, message, tmp_path):
    path = tmp_path / "step_profile.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        schema.read(path)


def test_without_jax():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, moejax.profiling.schema; sys.exit('jax' in sys.modules)"], cwd=ROOT, check=False
    )
    assert done.returncode == 0
