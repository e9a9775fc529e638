"""`eval:` in a config: when it comes, what it leaves, that it changes nothing of the training, and the mistakes it names."""

import json
import signal
import time

import pytest
from support import ROOT, tiny_experiments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loop import BLACKMAMBA, adapter, folder_of, losses, stop_at

from moejax import cli, config
from moejax.data import places
from moejax.data.pipeline import load as load_data
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.evaluation import generate
from moejax.training import loop, scoring
from moejax.training.loop import Trainer
from moejax.training.run_steps import scored_steps
from moejax.training.scoring import Scoring

PROBLEMS = str(ROOT / "assets/problems/test.json")
EVAL = {"task": "problems", "data": PROBLEMS, "limit": 6, "max_new_tokens": 4, "rows": 4, "each_epoch": True}
SIX = {"training": {"steps": 6, "gradient_accumulation": 1}, "data": {"holdout": 0}, "eval": EVAL}  # an epoch has 15 steps
EVERY_SECOND = SIX | {"eval": EVAL | {"every_steps": 2}}


def evaluations(folder):
    """(step, record) of every line of an evaluation, as they stand in the file."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line) for line in lines if "eval/accuracy" in line]


def no_seconds(pairs):
    return [(step, {k: v for k, v in record.items() if k != "eval/seconds"}) for step, record in pairs]


def test_when_it_comes_and_what_it_leaves(make_experiment, monkeypatch, capsys):
    """Untrained, after every epoch, at the end; the decoder compiled once; predictions, TensorBoard, best/; in no step's seconds."""
    evaluate, now, later = scoring.evaluate, time.perf_counter, [0.0]

    def and_wait(*arguments, **settings):
        later[0] += 1e6
        return evaluate(*arguments, **settings)

    monkeypatch.setattr(scoring, "evaluate", and_wait)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + later[0])
    experiment = make_experiment(data={"holdout": 0}, training={"steps": 12}, eval=EVAL | {"every_steps": 4, "metric": "loss"})
    before = generate._go_on.jitted()._cache_size()
    assert loop.run(experiment, resume=False) == 0
    assert generate._go_on.jitted()._cache_size() == before + 1
    folder = folder_of(experiment)
    found = evaluations(folder)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["step_seconds"] < 1e6 for line in steps if "loss" in line)
    # 60 records in rows of 64 tokens: 15 micro-batches of 4 an epoch, two micro-batches a step.
    assert [step for step, _ in found] == [0, 4, 8, 12]
    assert [record["eval/epoch"] for _, record in found] == [0, 4 / 8, 1, 1 + 4 / 8]
    for step, record in found:
        lines = [json.loads(line) for line in (folder / f"eval/step-{step}/predictions.jsonl").read_text().splitlines()]
        assert len(lines) == record["eval/problems"] == 6
        assert record["eval/accuracy"] == sum(line["correct"] for line in lines) / 6
        assert record["eval/accuracy_low"] <= record["eval/accuracy"] <= record["eval/accuracy_high"]
    assert found[-1][1]["eval/loss"] < found[0][1]["eval/loss"]
    assert {"score/accuracy", "score/loss", "answers"} <= set(EventAccumulator(str(folder)).Reload().Tags()["tensors"])
    best = json.loads((folder / "best/evaluation.json").read_text())
    assert best["eval/loss"] == min(record["eval/loss"] for step, record in found if step)
    assert (folder / "best/adapter/adapter_model.safetensors").exists()
    assert f"after step {best['step']}" in capsys.readouterr().out
    kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [8, 12]


def test_after_which_steps(make_experiment):
    """Epochs end where the data does: 60 records of one row each, 4 a micro-batch, two of these a step."""

    def steps(**settings):
        training = settings.pop("training", {"steps": 20})
        experiment = make_experiment(data={"holdout": 0}, training=training, eval=EVAL | settings)
        tokenizer = load_tokenizer(str(experiment.tokenizer))
        return sorted(scored_steps(experiment, load_data(experiment.data, tokenizer, 0, 512)))

    assert steps() == [0, 8, 16, 20]
    assert steps(each_epoch=False) == [0, 20]
    assert steps(each_epoch=False, every_steps=6) == [0, 6, 12, 18, 20]
    assert steps(every_steps=5) == [0, 5, 8, 10, 15, 16, 20]
    assert steps(training={"steps": None, "epochs": 2}) == [0, 8, 16]
    assert steps(training={"steps": None, "epochs": 3, "gradient_accumulation": 1}) == [0, 15, 30, 45]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nothing stopped: six steps, scored at every second."""
    experiment = tiny_experiments(tmp_path_factory.mktemp("straight"))("straight", **EVERY_SECOND)
    assert loop.run(experiment, resume=False) == 0
    return folder_of(experiment)


def test_training_is_the_same_to_the_bit_without_it(straight, make_experiment):
    experiment = make_experiment("without", **SIX | {"eval": None})
    assert loop.run(experiment, resume=False) == 0
    assert [step for step, _ in evaluations(straight)] == [0, 2, 4, 6]
    assert losses(folder_of(experiment)) == losses(straight)
    assert adapter(folder_of(experiment)) == adapter(straight)


def killed_at(monkeypatch, step, *, recorded):
    """As if the process had been killed in the evaluation after this step: before its result was written, or just after."""
    measure, write = Scoring.measure, loop.MetricWriter.write

    def and_die(self, at, *rest):
        if at == step and not recorded:
            raise KeyboardInterrupt  # with the step's state saved, or to be saved
        return measure(self, at, *rest)

    def write_and_die(self, at, record):
        write(self, at, record)
        if at == step and recorded and "eval/accuracy" in record:
            raise KeyboardInterrupt

    monkeypatch.setattr(Scoring, "measure", and_die)
    monkeypatch.setattr(loop.MetricWriter, "write", write_and_die)


def test_no_evaluation_is_lost_or_repeated(straight, make_experiment, monkeypatch):
    """Killed four times, in two evaluations before and after they were recorded: nothing is trained or evaluated a second time."""
    experiment = make_experiment("killed", **EVERY_SECOND)
    trained, measured = [], []
    finish, measure = Trainer._finish, Scoring.measure

    def and_note(self, at, *rest):
        record = measure(self, at, *rest)
        measured.append(at)
        return record

    monkeypatch.setattr(Trainer, "_finish", lambda self, pending: (trained.append(pending.step), finish(self, pending)))
    monkeypatch.setattr(Scoring, "measure", and_note)
    for number, (step, recorded) in enumerate([(0, False), (0, True), (4, False), (4, True)]):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            killed_at(patch, step, recorded=recorded)
            loop.run(experiment, resume=number > 0)
    assert loop.run(experiment, resume=True) == 0
    assert measured == [0, 2, 4, 6]
    assert sorted(set(trained)) == [1, 2, 3, 4, 5, 6] and trained == sorted(trained)
    folder = folder_of(experiment)
    assert no_seconds(evaluations(folder)) == no_seconds(evaluations(straight))
    assert losses(folder) == losses(straight)
    weights = [(f / "best/adapter/adapter_model.safetensors").read_bytes() for f in (folder, straight)]
    assert weights[0] == weights[1]


def test_a_signal_ends_an_evaluation_and_resuming_makes_it(make_experiment, monkeypatch):
    """The step is saved at once, the evaluation after it left for later; so is one that had begun."""
    experiment = make_experiment(**SIX | {"eval": EVAL | {"every_steps": 3}})
    evaluate = scoring.evaluate
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert loop.run(experiment, resume=False) == 128 + signal.SIGTERM
    assert [step for step, _ in evaluations(folder_of(experiment))] == [0]
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "evaluate", lambda *a, **k: (signal.raise_signal(signal.SIGTERM), evaluate(*a, **k))[1])
        assert loop.run(experiment, resume=True) == 128 + signal.SIGTERM
    assert [step for step, _ in evaluations(folder_of(experiment))] == [0]
    assert loop.run(experiment, resume=True) == 0
    assert [step for step, _ in evaluations(folder_of(experiment))] == [0, 3, 6]


@pytest.mark.long
def test_a_blackmamba_is_scored_and_its_best_model_kept(make_experiment):
    settings = BLACKMAMBA | {"training": {"steps": 2}, "eval": EVAL | {"limit": 2}}
    experiment = make_experiment(**settings)
    assert loop.run(experiment, resume=False) == 0
    folder = folder_of(experiment)
    assert [step for step, _ in evaluations(folder)] == [0, 2]
    assert (folder / "best/model/model.safetensors").read_bytes() == (folder / "model/model.safetensors").read_bytes()
    assert (folder / "best/model/tokenizer.json").exists()


def test_the_best_is_the_first_of_equal_ones():
    results = {0: 0.9, 2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6}
    found = Scoring.__new__(Scoring)
    found.results = {step: {"eval/accuracy": v, "eval/loss": v} for step, v in results.items()}
    found.metric = "eval/accuracy"
    assert found.best() == 4
    found.metric = "eval/loss"
    assert found.best() == 2
    found.results = {0: {"eval/loss": 1.0}}
    assert found.best() is None


@pytest.fixture
def written(make_experiment, tmp_path):
    """written(section changes) -> path of a config file."""

    def write(**sections):
        path = tmp_path / "config.yaml"
        path.write_text(config.dump(make_experiment("never", **sections)))
        return str(path)

    return write


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "problem"}, "unknown task 'problem': did you mean problems"),
        ({"task": "hellaswag"}, "unknown task 'hellaswag': did you mean hellaswag-generated"),
        ({"data": "TRAIN"}, "(it is the same file): 6 of its 6 problems are trained on"),
        ({"data": "COPY"}, "1 of its 2 problems are trained on"),
        ({"data": "OPEN"}, "record 0 has no `answer`"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(changes, message, dry, written, tmp_path, capsys):
    train, test = (json.loads(path.read_text()) for path in (tmp_path / "train.json", ROOT / "assets/problems/test.json"))
    respaced = train[3] | {"instruction": train[3]["instruction"].replace(" ", "  ")}
    (tmp_path / "copy.json").write_text(json.dumps([test[0], respaced]))
    (tmp_path / "open.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    places = {"TRAIN": "train.json", "COPY": "copy.json", "OPEN": "open.json"}
    if "data" in changes:
        changes = {"data": str(tmp_path / places[changes["data"]])}
    path = written(eval=EVAL | changes)
    assert cli.main(["train", "--config", path, *(["--dry-run"] if dry else [])]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_overlap_with_data_that_is_no_local_file(written, tmp_path, capsys, monkeypatch):
    """As in the study's configs, whose data.source is a URL."""
    train = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "tail.json").write_text(json.dumps(train[:2]))
    path = written(eval=EVAL | {"data": str(tmp_path / "tail.json")}, data={"source": "https://example.org/train.json"})
    monkeypatch.setattr(places, "_downloaded", lambda url, given: tmp_path / "train.json")
    assert cli.main(["train", "--config", path]) == 2
    assert "tail.json: 2 of its 2 problems are trained on (in https://example.org/train.json)" in capsys.readouterr().err


def test_a_missing_file(written, tmp_path, capsys):
    path = written(eval=EVAL | {"data": "nowhere.json"})
    assert cli.main(["train", "--config", path]) == 2
    assert "eval.data: data file nowhere.json does not exist" in capsys.readouterr().err
    assert cli.main(["train", "--config", path, "--dry-run"]) == 0
    assert "not there: eval.data = nowhere.json" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_records_held_out_of_the_training_file_are_no_overlap(written, tmp_path, capsys):
    """data.holdout takes them from the end; and who wants to test on what was trained can say so."""
    train = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "tail.json").write_text(json.dumps(train[-8:]))
    tail = EVAL | {"data": str(tmp_path / "tail.json")}
    assert cli.main(["train", "--config", written(eval=tail), "--dry-run"]) == 0
    assert "problems (the output's last number is the answer) at step 0, each epoch and at the end" in capsys.readouterr().out
    assert cli.main(["train", "--config", written(eval=tail, data={"holdout": 7}), "--dry-run"]) == 2
    assert "1 of its 6 problems" in capsys.readouterr().err
    assert cli.main(["train", "--config", written(eval=tail | {"allow_overlap": True}, data={"holdout": 0}), "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"eval": EVAL | {"max_new_tokens": 2040}}, r"eval\.max_new_tokens = 2040: .*exceed the model's 2048 positions"),
        ({"eval": EVAL | {"metric": "loss", "data": "BARE"}}, "eval.metric = loss, but there is no loss: .* without an `output`"),
        ({"eval": EVAL, "data": {"source": None, "batching": "fixed"}}, "eval asks questions, but data.source is null"),
        (
            {"eval": EVAL | {"every_steps": 3}, "training": {"steps": 12}, "profile": {"start_step": 2, "steps": 3}},
            "traces steps 2 to 4, and an evaluation comes after step 3: .* profile.start_step=4",
        ),
    ],
)
def test_what_cannot_be(sections, message, make_experiment, tmp_path):
    (tmp_path / "bare.json").write_text(json.dumps([{"instruction": "How many?", "answer": "3"}]))
    if sections["eval"]["data"] == "BARE":
        sections = sections | {"eval": sections["eval"] | {"data": str(tmp_path / "bare.json")}}
    if "data" in sections:
        sections = sections | {"data": sections["data"] | {"holdout": 0}}
    with pytest.raises(UserError, match=message):
        loop.run(make_experiment("never", **sections), resume=False)
    assert not (tmp_path / "runs").exists()


def test_without_reference_texts_there_is_no_loss_and_the_run_says_so(make_experiment, tmp_path, capsys):
    (tmp_path / "bare.json").write_text(json.dumps([{"instruction": "How many?", "answer": "3"}]))
    experiment = make_experiment(training={"steps": 1}, eval=EVAL | {"data": str(tmp_path / "bare.json")})
    assert loop.run(experiment, resume=False) == 0
    assert "no eval/loss: " in capsys.readouterr().out
    assert all("eval/loss" not in record for _, record in evaluations(folder_of(experiment)))


def test_out_of_memory_names_the_evaluation(make_experiment, monkeypatch):
    import jax

    def fail(*arguments, **settings):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB")

    monkeypatch.setattr(scoring, "evaluate", fail)
    with pytest.raises(UserError, match=r"out of memory in the evaluation after step 0: .*Lower eval\.rows \(4\)"):
        loop.run(make_experiment(**SIX), resume=False)


def test_keys_are_strict(make_experiment, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(config.dump(make_experiment(eval=EVAL)))
    with pytest.raises(UserError, match=r"unknown key eval\.each_epochs: did you mean each_epoch"):
        config.load(path, ["eval.each_epochs=true"])
    with pytest.raises(UserError, match=r"eval\.metric = 'f1': expected 'accuracy' or 'loss'"):
        config.load(path, ["eval.metric=f1"])
    assert config.load_profiled(path).eval is None
