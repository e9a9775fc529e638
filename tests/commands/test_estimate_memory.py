"""`estimate.py memory`: what it prints, what it refuses, and what it keeps."""

import json
import re

import pytest

from moejax import cli, config, installation
from moejax.commands import estimate_memory
from moejax.config import Experiment

SPARSE = ("--config", str(installation.CONFIGS / "mixtral_8x7b_cs_sparse.yaml"), "--closed-form")


def run(capsys, *arguments):
    code = cli.estimate_main(["memory", *arguments])
    return code, *capsys.readouterr()


def test_the_command(capsys):
    code, out, _ = run(capsys, *SPARSE, "--seq-len", "128")
    assert code == 0 and "A100-80" in out and "by the closed form, not by the compiler: --closed-form was given" in out
    assert "NF4 codes" in out and "padded to 128 tokens" in out
    code, out, _ = run(capsys, *SPARSE, "--gpu", "A40,L4", "--json")
    found = json.loads(out)
    a40, l4 = found["gpus"]
    assert code == 0 and found["row_tokens"] == 2048 and a40["queries"] > 10 * a40["rows"] > 0 and l4["rows"] == 0
    assert "GB more than" in l4["problem"] and "A40" in l4["problem"].split("; ")[1] and "would do" in l4["problem"]
    assert sum(a40["parts_gb"].values()) == pytest.approx(a40["peak_gb"]) and a40["peak_gb"] <= a40["usable_gb"]
    code, out, _ = run(capsys, *SPARSE, "--seq-len", "128", "--gpu", "A40,V100-32", "--json")
    assert json.loads(out)["gpus"][0]["problem"] is None and "V100-32 has no bf16" in json.loads(out)["gpus"][1]["problem"]
    code, _, err = run(capsys, *SPARSE, "--seq-len", "128", "--gpu", "V100-32")
    assert code == 2 and "would need 29.63 GB of its 29.44; RTX-5090" in err and "V100-32," not in err and "float32 would run" not in err
    tiny = ("--config", str(installation.CONFIGS / "bench_mixtral_tiny.yaml"), "--closed-form", "--rows", "10")
    code, out, _ = run(capsys, *tiny, "--gpu", "A40")
    assert code == 0 and " MB" in out and " 0.000" not in out
    code, _, err = run(capsys, *tiny, "--gpu", "T4", "training.compute_dtype=bfloat16")
    assert code == 2 and "T4 has no bf16" in err
    assert "training.compute_dtype=float32 training.param_dtype=float32 would run; RTX-4060, " in err
    code, out, _ = run(capsys, *SPARSE, "--gpu", "A40", "--rows", "3", "--json")
    assert json.loads(out)["gpus"][0]["rows"] == 3


def test_placements(capsys):
    """Less of the device and more of the host from line to line; what crosses the bus, and where it takes no longer than the products."""
    overrides = ("training.gradient_accumulation=2", "adapter.targets=[w1,w2,w3]")
    code, out, _ = run(capsys, *SPARSE, *overrides, "--gpu", "RTX-4090", "--rows", "1", "--seq-len", "512", "--placements", "--json")
    lines = json.loads(out)["placements"]
    assert code == 0 and [line["fits"] for line in lines] == ["no", "yes", "yes", "yes"]
    device, split, experts, tables = lines
    layers = int(split["experts"].removesuffix(" of 32 layers"))
    assert split["host_gb"] == pytest.approx(experts["host_gb"] * (32 - layers) / 32)
    assert split["bus_gb"] == pytest.approx(4 * split["host_gb"])
    assert split["device_gb"] <= 0.965 * split["usable_gb"] < split["device_gb"] + experts["host_gb"] / 32 and split["hidden"] == "no"
    assert device["host_gb"] == device["bus_gb"] == 0 and device["hidden"] == "-"
    assert device["device_gb"] > experts["device_gb"] > tables["device_gb"] and 23 < experts["host_gb"] < tables["host_gb"] < 24
    assert experts["bus_gb"] == pytest.approx(4 * experts["host_gb"])  # forward and backward, of two micro-batches
    assert experts["PCIe 4, s"] == experts["own, s"] == pytest.approx(experts["bus_gb"] / 25.2) and experts["hidden"] == "no"
    code, out, _ = run(capsys, *SPARSE, *overrides, "training.accumulation=layer_major", "--gpu", "RTX-4090", "--placements", "--json")
    assert json.loads(out)["placements"][2]["bus_gb"] == pytest.approx(2 * experts["host_gb"])  # of both together
    # The head once a micro-batch, and of the embedding 512 rows.
    assert tables["bus_gb"] - experts["bus_gb"] == pytest.approx(2 * 2 * 4096 * (32000 + 512) / 1e9)
    code, out, _ = run(capsys, *SPARSE, "--gpu", "RTX-4090", "--rows", "8", "--placements", "--json")
    assert json.loads(out)["placements"][2]["hidden"] == "yes"
    code, out, _ = run(capsys, *SPARSE, "--gpu", "RTX-4090", "--placements")
    assert code == 0 and "by the closed form, not by the compiler" in out
    code, out, _ = run(capsys, *SPARSE, "--gpu", "H100", "placement.experts=host", "--rows", "1")
    assert "also in the host's pinned memory: 23.253 GB of weights" in out
    code, _, err = run(capsys, *SPARSE, "--placements", "adapter=null", "quantization.format=none", "--gpu", "H100")
    assert code == 2 and "only frozen weights can lie in the host's memory" in err


def test_the_closed_form_leaves_room_for_its_error(capsys):
    """What it recommends has 3.5 % free; what it cannot call is said once, with the rows of each GPU."""
    code, out, _ = run(capsys, *SPARSE, "--gpu", "A40,A100-80,H100", "--json")
    for line in json.loads(out)["gpus"]:
        assert line["usable_gb"] >= 1.035 * line["peak_gb"] and line["free_gb"] > 0.3 and not line["problem"]
        assert re.fullmatch(rf"{line['rows'] + 1} to \d+ rows: too close to call by the closed form: compile .*", line["close"])
    code, out, _ = run(capsys, *SPARSE, "--gpu", "A40,A100-80,H100,A100-80")
    assert out.count("by the closed form, not by the compiler") == 1 and out.count("too close to call") == 1
    assert "A40, A100-80, H100: by the closed form, not by the compiler: --closed-form was given" in out
    code, out, _ = run(capsys, *SPARSE, "--gpu", "A40", "--rows", "11")  # fits by less than the error
    assert code == 0 and "A40: 11 rows: too close to call by the closed form: compile" in out
    code, _, err = run(capsys, *SPARSE, "--gpu", "RTX-5090", "--seq-len", "4096")
    assert code == 2 and "31.16 GB of the 30.98 GB usable on RTX-5090 (92% of its memory): too close to call" in err
    code, out, _ = run(capsys, *SPARSE, "--gpu", "RTX-5090,L4,H100", "--seq-len", "4096", "--json")
    assert code == 0 and [line["rows"] for line in json.loads(out)["gpus"]][:2] == [None, 0]  # which is not known; which does not fit
    assert "RTX-4090" not in err and "V100" not in err and "RTX-5090 would" not in err


def test_queries_of_a_packed_row_are_known_of_the_studys_sets_alone():
    """By the whole name: somebody's my_math_14k_long.json has other lengths."""
    study = config.load(SPARSE[1])
    assert estimate_memory.queries_per_row(study, 2048, False) == pytest.approx(20.5, abs=0.1)
    for source in ("data/my_commonsense_15k_long.json", "acme/math_14k-v2"):
        assert estimate_memory.queries_per_row(config.load(SPARSE[1], [f"data.source={source}"]), 2048, False) is None


def test_gpus_of_a_file(capsys, tmp_path):
    """By the closed form from the file's figures, also where a target of that name is known; the file's are among those that would do."""
    file = tmp_path / "gpus.yaml"
    mine = "{memory_gb: 64, bandwidth_gb_per_second: 1790, bf16_tflops: 210}"
    file.write_text(f"MINE: {mine}\nH100: {mine}\nOLD: {{memory_gb: 64, bandwidth_gb_per_second: 9, bf16_tflops: 9, bf16: false}}\n")
    code, out, _ = run(capsys, *SPARSE[:2], "--gpu-file", str(file), "--gpu", "MINE,H100", "--json")
    mine, h100 = json.loads(out)["gpus"]
    assert code == 0 and mine["usable_gb"] == h100["usable_gb"] == pytest.approx(0.92 * 64) and mine["rows"] == h100["rows"] > 10
    assert mine["reason"] and h100["reason"]
    code, _, err = run(capsys, *SPARSE, "--gpu-file", str(file), "--gpu", "L4")
    assert code == 2 and "MINE" in err.partition("(92%")[2] and "OLD" not in err
    assert run(capsys, *SPARSE, "--gpu-file", str(tmp_path / "none"), "--gpu", "L4")[0] == 2
    assert "unknown GPU 'MINE'" in run(capsys, *SPARSE, "--gpu", "MINE")[2]


def test_this_machine_is_compiled_for_and_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    file = tmp_path / "tiny.yaml"
    data = {"batching": "fixed", "row_tokens": 256, "batch_rows": 16}
    training = {"steps": 1, "compute_dtype": "float32"}
    sections = {"name": "memory", "model": {"preset": "mixtral-tiny"}, "data": data, "training": training}
    file.write_text(config.dump(Experiment.model_validate(sections)))
    arguments = ("--config", str(file), "--gpu", "here", "--rows", "2", "--seq-len", "64")
    assert "compiler (1 compiled, 0 kept)" in run(capsys, *arguments)[1]
    code, out, _ = run(capsys, *arguments, "--json")
    (line,) = json.loads(out)["gpus"]
    assert code == 0 and line["by"] == "compiler (0 compiled, 1 kept)" and "rest" in line["parts_gb"]
    assert sum(line["parts_gb"].values()) == pytest.approx(line["peak_gb"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "which experiment? Give its CONFIG"), (("--study", "--rows", "3"), "--study runs the study's own"),
     ((*SPARSE, "--gpu", ","), "--gpu ',': expected names of GPUs"), ((*SPARSE, "--gpu", "H1000"), "unknown GPU 'H1000': did you mean"),
     ((str(installation.CONFIGS / "blackmamba_2.8b.yaml"), "--closed-form", "adapter={}", "training.remat=full"),
      "adapter: a BlackMamba is trained whole here"),
     ((*SPARSE, "--rows", "0"), "--rows 0: expected 1 or more"), ((*SPARSE, "--seq-len", "-1"), "--seq-len -1"),
     ((*SPARSE, "--seq-len", "40000"), "exceed the model's max_position_embeddings"),
     ((*SPARSE, "--gpu", "L4"), "GB more than the 21.72 GB usable on L4"), (("--config", "no.yaml"), "no.yaml does not exist"),
     ((*SPARSE, "--gpu", "A40", "--rows", "500"), "500 rows of 2048 tokens needs")],
)  # fmt: skip
def test_mistakes_are_one_message(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_which_gpus_would_do_is_said_once():
    refused = ["8 GB more than the 22 GB usable on L4; A40, H100 would do", "T4 has no bf16. more; A40, H100 would do"]
    assert estimate_memory._said_once(refused) == [*(text.split("; ")[0] for text in refused), "A40, H100 would do"]
    assert estimate_memory._said_once([*refused, "a; no GPU of the table would do"]) == [*refused, "a; no GPU of the table would do"]
    assert estimate_memory._said_once(refused[:1]) == refused[:1]


def test_several_devices(capsys):
    """Bytes of each, rows of all; where whole weights do not fit, what would."""
    asked = (*SPARSE, "--gpu", "L4", "--seq-len", "512", "--devices", "2")
    code, out, _ = run(capsys, *asked, "mesh.weights=experts", "--json")
    (line,), mesh = json.loads(out)["gpus"], json.loads(out)["mesh"]
    assert code == 0 and line["gpu"] == "2 x L4" and mesh == {"devices": 2, "weights": "experts", "moments": "whole"}
    assert line["rows"] % 2 == 0 and line["rows"] > 8 and line["peak_gb"] < line["next_peak_gb"]
    code, out, _ = run(capsys, *asked, "mesh.weights=spread", "--rows", "8")
    assert code == 0 and "each holds a part of the rows of each frozen matrix (mesh.weights=spread)" in out
    code, _, err = run(capsys, *asked)
    assert code == 2 and "with 2 rows of 512 tokens on 2 devices (mesh.weights = whole; spread or experts would do) needs 28." in err
    for more, message in (
        (("--rows", "3", "mesh.weights=experts"), "--rows 3: of all 2 devices together"),
        (("--placements",), "--placements is of one device"),
    ):
        code, _, err = run(capsys, *asked, *more)
        assert code == 2 and message in err
    code, _, err = run(capsys, *SPARSE, "--gpu", "L4", "--devices", "3", "mesh.weights=experts")
    assert code == 2 and "8 experts over 3 devices do not divide" in err
    code, _, err = run(capsys, *SPARSE, "--gpu", "L4", "mesh.weights=experts")
    assert code == 2 and "Give --devices N" in err


@pytest.mark.parametrize(
    ("config", "gpu", "change", "told"),
    [("olmoe_1b_7b", "v5e-1", "model.moe_backend=decode", "model.moe_backend = decode is for GPUs"),
     ("deepseek_v2_lite_16gb", "H100", "model.attention=flash", "model.attention = flash: latent attention goes by blocks")],
)  # fmt: skip
def test_a_kernel_that_a_card_cannot_run_is_refused_by_the_closed_form_too(config, gpu, change, told, capsys):
    asked = (str(installation.CONFIGS / f"{config}.yaml"), "--gpu", gpu, "--closed-form", "--rows", "1", "training.remat=full", change)
    code, _, err = run(capsys, *asked)
    assert code == 2 and told in err and "Traceback" not in err
