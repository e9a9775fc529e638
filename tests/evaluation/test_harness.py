"""lm-evaluation-harness on our models, offline, with local task files (extra `eval`; `make test` installs it)."""

import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from support import ROOT, finished_run, full_logits

from moejax import cli
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.evaluation.generate import generate
from moejax.evaluation.loglikelihood import loglikelihoods
from moejax.runs.open import load

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[eval]' (make test does)")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from moejax.evaluation import harness  # noqa: E402
from moejax.evaluation.harness import MoejaxLM  # noqa: E402

MODEL = ROOT / "assets/tiny-mixtral"


def questions(count):
    """One-step questions, which the bundled base was pre-trained on: it is right about most."""
    rng = random.Random(3)
    for _ in range(count):
        a, b = rng.randint(3, 50), rng.randint(2, 30)
        text = f"Tom has {a} apples. Ana has {b} more. How many apples does Ana have?"
        yield {"instruction": text, "input": "", "output": "", "answer": str(a + b)}


def endings(count):
    """Stories of which one ending is the right number of apples."""
    rng = random.Random(4)
    for _ in range(count):
        a, b = rng.randint(3, 50), rng.randint(2, 9)
        totals = [a + b, a + b + 1, a - b, 10 * (a + b)]
        label = rng.randrange(4)
        totals[0], totals[label] = totals[label], totals[0]
        choices = [f"Now Tom has {n} apples." for n in totals]
        yield {"ctx": f"Tom has {a} apples. He finds {b} new ones.", "endings": choices, "label": label}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Local task files, as a user would write them, and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [{"text": "Count: 1, 2, 3, 4."}, {"text": "Sums: 3 + 4 = 7. 5 - 2 = 3. " * 9}]
    for name, records in (("questions", questions(12)), ("endings", endings(12)), ("texts", texts)):
        (folder / f"{name}.json").write_text(json.dumps(list(records)))

    def task(name, data, **settings):
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{data}.json")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content | settings))

    task(
        "local_questions",
        "questions",
        output_type="generate_until",
        doc_to_text="[INST] {{instruction}} [/INST]",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["</s>"], "max_gen_toks": 48, "do_sample": False},
        filter_list=[
            {
                "name": "last-number",
                "filter": [
                    {"function": "regex", "regex_pattern": "(-?[0-9]+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    choices = {"doc_to_text": "{{ctx}}", "doc_to_choice": "endings", "doc_to_target": "label"}
    task("local_endings", "endings", output_type="multiple_choice", metric_list=metrics, **choices)
    rolling = [{"metric": "bits_per_byte"}]
    task(
        "local_texts",
        "texts",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=rolling,
    )
    return folder


def evaluated(folder, name, model, **arguments):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=[name], task_manager=manager, bootstrap_iters=0, **arguments)


@pytest.fixture(scope="module")
def model():
    return MoejaxLM(MODEL, batch_size=8)


def kept(folder, task, data, run=MODEL):
    """result.json of `moejax eval` on the same items."""
    out = folder / "out" / task
    arguments = ["eval", str(run), "--task", task, "--data", str(folder / f"{data}.json"), "--out", str(out), "--rows", "8"]
    assert cli.main([*arguments, "--max-new-tokens", "48"]) == 0
    return json.loads((out / "result.json").read_text())


def test_generated_answers_equal_moejax_eval(tasks, model):
    result = evaluated(tasks, "local_questions", model)
    ours = kept(tasks, "problems", "questions")
    assert result["results"]["local_questions"]["exact_match,last-number"] == pytest.approx(ours["accuracy"], abs=1e-12)
    assert ours["correct"] > 0 and ours["n"] == 12
    said = [sample["resps"][0][0] for sample in result["samples"]["local_questions"]]
    lines = (tasks / "out/problems/predictions.jsonl").read_text().splitlines()
    assert said == [json.loads(line)["output"] for line in lines]


def test_likeliest_endings(tasks, model):
    """Scored one by one, as a whole and per character."""
    result = evaluated(tasks, "local_endings", model)["results"]["local_endings"]
    right = {"acc": 0, "acc_norm": 0}
    records = json.loads((tasks / "endings.json").read_text())
    for record in records:
        pairs = [model._encode_pair(record["ctx"], f" {ending}") for ending in record["endings"]]
        scores = np.array([s.loglikelihood for s in loglikelihoods(model.model, pairs, rows=len(pairs))])
        for metric, lengths in (("acc", 1), ("acc_norm", [len(ending) for ending in record["endings"]])):
            right[metric] += int(np.argmax(scores / lengths)) == record["label"]
    assert all(result[f"{metric},none"] == pytest.approx(count / len(records), abs=1e-12) for metric, count in right.items())
    assert right["acc"] > 0


@pytest.mark.long
def test_rolling(tasks, model, monkeypatch):
    """Each token is predicted once, also where a text is longer than the model reads: against windows made by hand."""
    text = "Sums: 3 + 4 = 7. 5 - 2 = 3. " * 9
    ids = model.tok_encode(text)

    def request(text):
        return Instance("loglikelihood_rolling", {}, (text,), 0)

    whole = loglikelihoods(model.model, [([model.eot_token_id], ids)], rows=1)[0].loglikelihood
    assert model.loglikelihood_rolling([request("Count"), request(text), request("")])[1:] == [
        pytest.approx(whole, abs=1e-3),
        0.0,
    ]
    bits = evaluated(tasks, "local_texts", model)["results"]["local_texts"]["bits_per_byte,none"]
    first = model.loglikelihood_rolling([request("Count: 1, 2, 3, 4.")])[0]
    assert bits == pytest.approx(-(first + whole) / (18 + len(text.encode())) / math.log(2), rel=1e-5)
    monkeypatch.setattr(model.model, "config", model.model.config.replace(max_position_embeddings=64))
    seen = [([model.eot_token_id], ids[:64])]
    for start in range(64, len(ids), 64):
        part = ids[start : start + 64]
        seen.append((ids[: start + len(part)][-65 : -len(part)] or ids[start - 1 : start], part))
    by_hand = sum(s.loglikelihood for s in loglikelihoods(model.model, seen, rows=2))
    assert model.loglikelihood_rolling([request(text)]) == [pytest.approx(by_hand, abs=1e-3)]


def test_stops_lengths_and_sampling(model, monkeypatch):
    decoded = []

    def seen(*arguments, **settings):
        outputs = generate(*arguments, **settings)
        decoded.append(max(map(len, outputs)))
        return outputs

    monkeypatch.setattr(harness, "generate", seen)

    def ask(text, **settings):
        return model.generate_until([Instance("generate_until", {}, (text, settings), 0)])[0]

    text = "[INST] Tom has 4 apples. Ana has 5 more. How many apples does Ana have? [/INST]"
    whole = ask(text, max_gen_toks=48)
    assert "The answer" in whole
    assert ask(text, max_gen_toks=48, until=[" The", "zzz"]) == whole[: whole.index(" The")]
    assert ask(text, max_gen_toks=48, until=" The") == whole[: whole.index(" The")]
    assert ask(text, max_gen_toks=48, until=whole[0]) == ""
    assert decoded[-1] == 1 < decoded[0]  # it stops after the first token, not where the answer ends
    (tokens,) = generate(model.model, [model.tok_encode(text)], max_new_tokens=5, end=model.eot_token_id)
    assert ask(text, max_new_tokens=5) == model.tokenizer.decode(tokens, skip_special_tokens=True)
    drawn = {ask(text, max_gen_toks=16, do_sample=True, temperature=3.0, seed=seed) for seed in (1, 2)}
    assert len(drawn) == 2 and drawn == {
        ask(text, max_gen_toks=16, do_sample=True, temperature=3.0, seed=seed) for seed in (1, 2)
    }
    repeats = [Instance("generate_until", {}, (text, {"max_gen_toks": 16, "do_sample": True, "temperature": 3.0}), 0)] * (2 * model.rows)
    assert len(set(model.generate_until(repeats))) > model.rows  # drawn again in every batch, not only inside one
    with pytest.raises(UserError, match="generation_kwargs num_beams: not known"):
        ask(text, num_beams=4)
    with pytest.raises(UserError, match="3000 new tokens: the model has 2048 positions"):
        ask(text, max_gen_toks=3000)


def test_too_long_a_context_loses_its_beginning(model, monkeypatch):
    monkeypatch.setattr(model.model, "config", model.model.config.replace(max_position_embeddings=32))
    request = Instance("loglikelihood", {}, ("3 + 4 = 7. " * 20, " 3 + 4"), 0)
    context, continuation = model._encode_pair(*request.args)
    expected = loglikelihoods(model.model, [(context[len(continuation) - 33 :], continuation)], rows=1)[0]
    assert model.loglikelihood([request]) == [(pytest.approx(expected.loglikelihood, abs=1e-4), expected.greedy)]


def test_a_run_and_its_base(tasks, tmp_path):
    """By its folder; with the adapter, and without."""
    run = tmp_path / "run"
    finished_run(run, training={"steps": 1, "compute_dtype": "float32"})
    scores = []
    for base in (False, True):
        lm = MoejaxLM(str(run), base=base, batch_size="4", device="cpu")
        make, _, tokenizer, *_ = load(run, base)
        ids = tokenizer.encode("Tom has 4 apples.", add_special_tokens=False)
        expected = loglikelihoods(make(), [([lm.eot_token_id], ids)], rows=4)[0].loglikelihood
        (found,) = lm.loglikelihood([Instance("loglikelihood", {}, ("", "Tom has 4 apples."), 0)])
        assert found[0] == pytest.approx(expected, abs=1e-4)
        scores.append(found[0])
    assert abs(scores[0] - scores[1]) > 1e-2


def test_a_blackmamba():
    lm = MoejaxLM(ROOT / "assets/tiny-blackmamba", batch_size=2)
    assert lm.max_length == 2048
    (found,) = lm.loglikelihood([Instance("loglikelihood", {}, ("Count: 1, 2, 3,", " 4, 5."), 0)])
    context, continuation = lm._encode_pair("Count: 1, 2, 3,", " 4, 5.")
    tokens = jnp.array([context + continuation])
    logits = full_logits(lm.model, tokens, jnp.ones_like(tokens))[0, len(context) - 1 : -1]
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.array(continuation)[:, None], -1).sum()
    assert found[0] == pytest.approx(float(expected), abs=1e-4)


def test_processes_that_ask_for_other_things(model, monkeypatch):
    """Every process must come to the same programs: requests are compared before. Two real ones: test_asked_of_two_processes.py."""
    seen = []
    monkeypatch.setattr(harness.processes, "same", lambda parts: seen.append(parts))
    model.loglikelihood([Instance("loglikelihood", {}, ("1, 2,", " 3"), 0)], disable_tqdm=True)
    model.generate_until([Instance("generate_until", {}, ("1, 2,", {"max_gen_toks": 1}), 0)], disable_tqdm=True)
    (scored,), (asked,) = (parts.values() for parts in seen)
    assert scored == [tuple(map(model.tok_encode, ("1, 2,", " 3")))] and asked[0] == [model.tok_encode("1, 2,")]


def test_bad_models(tmp_path):
    with pytest.raises(UserError, match="give a folder"):
        MoejaxLM()
    with pytest.raises(UserError, match="batch_size = auto"):
        MoejaxLM(MODEL, batch_size="auto")
    with pytest.raises(UserError, match="is not a finished run"):
        MoejaxLM(tmp_path)
    with pytest.raises(UserError, match="has no chat template"):
        MoejaxLM(model=object(), tokenizer=load_tokenizer(str(MODEL))).apply_chat_template([{"role": "user", "content": "a"}])
