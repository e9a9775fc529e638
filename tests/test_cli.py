"""The command line: exit codes, messages, and nothing heavy before it is needed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from moejax import cli, config, runtime

CONFIG = str(ROOT / "configs" / "mixtral_8x7b_cs_sparse.yaml")


def python(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def test_a_mistake_is_one_message_and_exit_code_2():
    done = python("train.py", "--config", CONFIG, "training.learnin_rate=1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[0].startswith("error: ") and "did you mean learning_rate" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", CONFIG, "--lr", "1e-4"], "as key.sub=value: did you mean training.learning_rate=1e-4?"),
        (["train", "--config", CONFIG, "--learning_rate=1e-4"], "did you mean training.learning_rate=1e-4?"),
        (["train", "--config", CONFIG, "--lora-r", "8"], "did you mean adapter.rank=8?"),
        (["train", "--config", CONFIG, "--training.steps", "3"], "did you mean training.steps=3?"),
        (["train", "--config", CONFIG, "--training.lr", "3"], "did you mean training.learning_rate=3?"),
        (["trian"], "'trian' is no command of moejax: did you mean train?"),
        (["finetune", "x"], "did you mean train?"),
        (["frobnicate"], "expected one of init, data, train, export,"),
        (["train", "--config", "configs"], "config file configs is a folder"),
        (["train", "--config", CONFIG, "--bf16"], "did you mean training.compute_dtype=VALUE?"),
        (["train", "--config", CONFIG, "--r", "8"], "did you mean adapter.rank=8?"),  # not --resume for short
        (["train", "--config", CONFIG, "--dry_run"], "--dry_run is no option of moejax train: did you mean --dry-run?"),
        (["train", "--config", CONFIG, "--qqq"], "takes values of the config as key.sub=value, without dashes"),
        (["train", "--config", CONFIG, "lr=1"], "unknown key lr: did you mean training.learning_rate?"),
        (["train", "--config", CONFIG, "--resume", "lr=1"], "unknown key lr: did you mean training.learning_rate?"),
        (["train", "--config", CONFIG, "seed=1", "--resume", "now"], "'now' is one argument too many for moejax train"),
        (["profile", CONFIG, "--batch_size=8"], "did you mean data.batch_rows=8?"),
        (["generate", "x", "--prompt", "y", "--max_new_tokens=3"], "did you mean --max-new-tokens?"),
        (["generate", "x", "--prompt", "y", "--max_new_tokens=3"], "usage: moejax generate ["),
        (["generate", "--prompt", "y"], "which run? Give one RUN"),
        (["generate", "x", "--run", "y", "--prompt", "z"], "which run? Give one RUN"),
        (["estimate", "memory", CONFIG, "--rowes", "3"], "--rowes is no option of moejax estimate memory: did you mean --rows?"),
        (["estimate", "nope"], "'nope' is no command of moejax estimate: expected one of memory, predict, plan,"),
        (["estimate", "predit"], "'predit' is no command of moejax estimate: did you mean predict?"),
        (["predict"], "'predict' is no command of moejax: did you mean estimate predict?"),
        (["--verbose", "train"], "--verbose is no option of moejax: expected a command first"),
        (["estimate", "receipts", CONFIG], "too many for moejax estimate receipts, which takes no config: see"),
        (["profile", "demo.yaml"], "config file demo.yaml does not exist: did you mean configs/demo.yaml?"),
        (["profile", "nosuch.yaml"], "config file nosuch.yaml does not exist (expected a YAML file; `moejax init` writes one)"),
        (["estimate", "predict", "--memory", "closed_form"], "--memory closed_form: expected one of equation-1, closed-form; did you mean"),
        (["export", "x", "--out", "y", "--for", "ollama"], "--for ollama: what it loads is written by --format gguf"),
        (["export", "x"], "the following arguments are required: --out\nusage: moejax export ["),
        (["doctor", "now"], "'now' is one argument too many for moejax doctor"),
    ],
)
def test_options_of_other_tools_are_told_in_our_words(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    if arguments[0] == "train":
        assert cli.train_main(arguments[1:]) == 2
        assert message.replace("moejax train", "train.py") in capsys.readouterr().err


@pytest.mark.parametrize(("main", "arguments"), [(cli.main, []), (cli.train_main, []), (cli.estimate_main, []), (cli.main, ["estimate"])])
def test_without_arguments_the_help_is_shown(main, arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moejax"])  # as `moejax` and `python -m moejax` call it
    assert main(arguments or None) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: ") and "--help" in shown.out and not shown.err


def test_every_command_has_its_help(capsys):
    """Its module is there, with add_arguments and run; the overview names it in its group."""
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert max(map(len, overview.splitlines())) <= 80
    assert [line.rstrip(":") for line in overview.splitlines() if line.endswith(":")] == list(cli.GROUPS)
    for name, command in (cli.COMMANDS | {f"estimate {name}": command for name, command in cli.ESTIMATE.items()}).items():
        try:
            assert cli.main([*name.split(), "--help"]) == 0
        except SystemExit as ended:
            assert ended.code == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: moejax {name} [") and command.help[1:] in " ".join(out.split()), name
        assert not command.commands or max(map(len, out.splitlines())) <= 80
        assert command.commands or callable(importlib.import_module(command.module).run)
        assert " " in name or f"  {name} " in overview


def test_what_this_user_may_not_read_is_one_message(monkeypatch, capsys):
    """Also where nothing nearer says so: pathlib's is_file() and is_dir() raise it for what lies in a folder without x."""

    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", locked)
    assert cli.train_main(["--config", str(ROOT / "configs/demo.yaml"), "model.source=locked/model", "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: locked/model: permission denied: this user may not read it")


def test_dry_run_of_the_full_model(capsys):
    """46.7 B parameters in NF4 but for embeddings, norms and head; 228.6 M trained in fp32. No network, no weights."""
    assert cli.train_main(["--config", CONFIG, "--dry-run"]) == 0
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert "46,702,792,704" in lines["base model"]
    assert "228,593,664" in lines["trained"] and "float32" in lines["trained"]
    for group in ("attention", "experts", "router"):
        assert "NF4" in lines[group] and "frozen" in lines[group]
    for group in ("embeddings", "head", "norms"):
        assert "bfloat16" in lines[group]
    assert "23.264" in lines["experts"]


def test_dry_run_of_blackmamba(capsys):
    """Counts to the digit for top-2 and dense, and what weights, gradients and moments take in the study's bf16."""
    for kind, active in (("sparse", "936,548,368"), ("dense", "2,783,213,584")):
        assert cli.train_main(["--config", str(ROOT / f"configs/blackmamba_2.8b_math_{kind}.yaml"), "--dry-run"]) == 0
        lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
        assert "2,783,213,584" in lines["base model"] and "2,783,213,584" in lines["trained"]
        assert active in next(line for name, line in lines.items() if name.startswith("active per token"))
        assert "5.566" in lines["weights in memory"] and "11.133" in lines["adamw state"]
    wide = ["--config", str(ROOT / "configs/blackmamba_2.8b_cs_sparse.yaml"), "--dry-run", "training.param_dtype=float32"]
    assert cli.train_main(wide) == 0
    out = capsys.readouterr().out
    fits, small = (next(line for line in out.splitlines() if line.startswith(start)) for start in ("fits (", "does not fit"))
    assert "44.53" in out and "A100-80" in fits and "A40," not in fits and "A40," in small  # fp32 masters: not on 48 GB
    assert "no bf16, which the training section asks for: T4, V100-16, V100-32" in out and "V100" not in fits + small
    one = ["--config", str(ROOT / "configs/blackmamba_2.8b_cs_sparse.yaml"), "--dry-run", "model.experts_per_token=1"]
    assert cli.train_main(one) == 0
    assert "628,770,832" in capsys.readouterr().out


def test_dry_run_of_a_tiny_model_in_fp32(capsys):
    """Small sizes in MB, and a GPU without bf16 will do. A Hub id alone says no sizes."""
    assert cli.train_main(["--config", str(ROOT / "configs/bench_mixtral_tiny.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "27.1 MB" in out and " 0.000 " not in out and "V100-32" in out and "no bf16" not in out
    assert cli.train_main(["--config", CONFIG, "--dry-run", "model.preset=null", "model.source=acme/large"]) == 2
    err = capsys.readouterr().err
    assert "model.source = 'acme/large' is no folder here" in err and "add model.preset (one of mixtral-8x7b, " in err


def test_dry_run_names_the_files_that_are_not_there(capsys, tmp_path, monkeypatch):
    """Local ones alone: a URL or a Hub id needs a network to be looked for."""
    assert cli.train_main(["--config", CONFIG, "--dry-run"]) == 0
    assert "not there" not in capsys.readouterr().out
    lost = [f"data.source={tmp_path}/lost.json", f"adapter.init_from={tmp_path}/lost", "data.records=null", "data.bytes=null"]
    one = ["training.epochs=1", "training.warmup_steps=1", "data.batch_rows=1"]
    assert cli.train_main(["--config", CONFIG, "--dry-run", *lost, *one]) == 0
    out = capsys.readouterr().out
    assert "of 1 row, " in out and "schedule: 1 epoch; " in out and ", 1 warm-up step, " in out
    assert "does not use the network" not in out, "said once, with its cause"
    told = [line for line in out.splitlines() if line.startswith("not there")]
    assert [line.split("(")[0].strip() for line in told] == [
        f"not there: data.source = {tmp_path}/lost.json",
        f"not there: adapter.init_from = {tmp_path}/lost",
    ]


def test_dry_run_judges_records_whose_tokenizer_is_not_here(capsys, tmp_path):
    """A model of the Hub, and the user's own file: its columns are reported before anything is downloaded."""
    arguments = ["--config", str(ROOT / "configs/qwen3_30b_a3b_24gb.yaml"), "--dry-run", "data.batching=pad_longest"]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{n}?", "output": "yes"}) for n in range(1001)))
    assert cli.train_main([*arguments, f"data.source={path}"]) == 2
    assert "mine.jsonl, record 0: no columns of questions and answers are known by their names" in capsys.readouterr().err
    named = [f"data.source={path}", "data.fields={instruction: question}"]
    assert cli.train_main([*arguments, *named, "data.holdout=1001"]) == 2
    assert "data.holdout = 1001 leaves nothing of 1001 records" in capsys.readouterr().err
    assert cli.train_main([*arguments, *named]) == 0
    out = capsys.readouterr().out
    assert "data: 801 records to train on and 200 to hold out, " in out
    assert "does not use the network: model.source = Qwen/Qwen3-30B-A3B is no file or folder here" in out
    assert "schedule: 3 epochs of 801 records: 201 steps each, 603 in all" in out
    with_lost = [*arguments, *named, "data.holdout=0", f"data.eval_source={tmp_path}/lost.jsonl"]
    assert cli.train_main(with_lost) == 0
    out = capsys.readouterr().out
    assert "data: 1,001 records to train on, all" in out and f"not there: data.eval_source = {tmp_path}/lost.jsonl" in out


def test_a_backend_that_is_not_there_is_refused_by_name(capsys, tmp_path):
    data = f"data.source={ROOT}/assets/problems/train.json"
    arguments = ["--config", str(ROOT / "configs" / "demo.yaml"), f"runs_dir={tmp_path}", f"model.source={ROOT}/assets/tiny-mixtral", data]
    assert cli.train_main([*arguments, "model.moe_backend=rugged"]) == 2
    assert "model.moe_backend = 'rugged': expected 'auto', 'loop', 'capacity', 'ragged' or 'decode'" in capsys.readouterr().err
    assert cli.train_main([*arguments, "model.attention=flash"]) == 2
    told = "model.attention = flash: jax's flash attention is for GPUs and TPUs, and this is a CPU. Expected auto"
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_a_blackmamba_is_refused(capsys):
    config = str(ROOT / "configs/blackmamba_2.8b_cs_sparse.yaml")
    assert cli.train_main(["--config", config, "--dry-run", "adapter={targets: [q_proj, w1]}"]) == 2
    assert "a BlackMamba is trained whole here (it has no q_proj): remove the adapter" in capsys.readouterr().err
    assert cli.train_main(["--config", config, "--dry-run", "adapter={}", "preference={}", "training.label_smoothing=0"]) == 2
    assert "remove the adapter and quantization sections, and preference, which needs an adapter" in capsys.readouterr().err


def test_jax_is_set_up_before_it_is_imported(monkeypatch, tmp_path):
    names = ("XLA_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    for name in names:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    device = ["device.memory_fraction=0.8", "device.compilation_cache=~/here"]
    assert cli.train_main(["--config", CONFIG, "--dry-run", "device.compilation_cache=null"]) == 0
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    monkeypatch.delenv(names[0])
    assert cli.train_main(["--config", CONFIG, "--dry-run", *device]) == 0
    assert [os.environ[name] for name in names] == ["0.8", str(Path("~/here").expanduser()), "0.1"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))  # the environment wins
    assert cli.train_main(["--config", CONFIG, "--dry-run", *device]) == 0
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)


@pytest.mark.parametrize(
    ("old", "now", "note"),
    [("generate --run nowhere --prompt a", "generate nowhere --prompt a", "--run is now RUN by itself"),
     ("estimate plan --tool study --dataset gsm8k --row-tokens 512", "estimate plan --tool study --dataset gsm8k --seq-len 512",
      "--row-tokens is now --seq-len")],
)  # fmt: skip
def test_the_last_releases_names_do_the_same_and_say_so(old, now, note, capsys):
    code = cli.main(old.split())
    out, err = capsys.readouterr()
    assert err.startswith(f"note: {note}; the old name goes with the next release\n")
    assert (cli.main(now.split()), *capsys.readouterr()) == (code, out, err.partition("\n")[2])
    with pytest.raises(SystemExit):
        cli.main([*old.partition(" --")[0].split(), "--help"])
    assert note.split()[0] not in capsys.readouterr().out


def test_missing_data_is_told_before_anything_is_written(tmp_path, capsys):
    arguments = ["--config", str(ROOT / "configs" / "demo.yaml"), f"runs_dir={tmp_path}", "data.source=nowhere.json"]
    assert cli.train_main([*arguments, f"model.source={ROOT}/assets/tiny-mixtral"]) == 2
    assert "nowhere.json does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


WITHOUT_JAX = ["moejax", "moejax.models", "moejax.models.config", "moejax.cli", "moejax.config", "moejax.data.pipeline"]


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_imports_without_jax(module):
    done = python("-c", f"import sys, {module}; sys.exit('jax' in sys.modules)")
    assert done.returncode == 0, f"{module} imports jax\n{done.stderr}"


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["export", "--out", "x"], ["exact-match", "--data", "d.json"]])
def test_commands_on_a_run_keep_compiled_programs_where_its_config_says(command, monkeypatch, tmp_path):
    """Also where there is no run: the command itself says so."""
    told = []
    monkeypatch.setattr(runtime, "prepare_jax", lambda device: told.append(device.compilation_cache))
    (tmp_path / "config.yaml").write_text(
        "name: a\nmodel: {preset: mixtral-tiny}\ndata: {batching: fixed}\ntraining: {steps: 1}\ndevice: {compilation_cache: /elsewhere}\n"
    )
    assert cli.main([*command, str(tmp_path)]) == 2 and cli.main([*command, str(tmp_path / "none")]) == 2
    assert told == ["/elsewhere", config.DeviceConfig().compilation_cache]


def test_a_user_without_a_home_folder_is_one_message(capsys):
    def call():
        raise RuntimeError("Could not determine home directory.")

    assert cli.guarded(call, "moejax") == 2
    assert capsys.readouterr().err.startswith("error: this user has no home folder, where caches are kept: set HOME to")
