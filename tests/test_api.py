"""The Python API: what a notebook calls, held against what the command line and the reference compute."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import ROOT, finished_run, tiny_experiments

import moejax
from moejax.data.pipeline import load as load_data
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.models.ops.cross_entropy import linear_cross_entropy
from moejax.training.optimizer import make_optimizer, make_schedule
from moejax.training.program import TrainProgram

RECORDS = [
    {"instruction": "Tom has 3 apples and gets 4. How many?", "output": "3 + 4 = 7"},
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    finished_run(folder)
    return folder


@pytest.fixture(scope="module")
def lm(run):
    return moejax.load(run)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return tiny_experiments(tmp_path_factory.mktemp("api"))


def by_hand(model, batch, **how):
    """Cross-entropy from whole logits."""
    hidden, stats = model(batch.tokens, batch.segment_ids, batch.positions, **how)
    likely = jax.nn.log_softmax(model.logits(hidden))
    return -jnp.sum(jnp.take_along_axis(likely, batch.targets[..., None], -1)[..., 0] * batch.loss_mask), stats


def test_importing_it_imports_no_jax():
    code = (
        "import sys, moejax; assert 'jax' not in sys.modules and 'train' in dir(moejax); "
        "assert all(getattr(moejax, name) for name in moejax.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'trian': it has Batch, "):
        moejax.trian  # noqa: B018


def test_answers_are_those_of_the_command(run, lm, capsys):
    from moejax.cli import main

    question = RECORDS[0]["instruction"]
    assert main(["generate", str(run), "--instruction", question, "--max-new-tokens", "12"]) == 0
    assert lm.chat(question, max_new_tokens=12) == capsys.readouterr().out.removesuffix("\n")
    both = lm.generate(["Tom has", "How many"], max_new_tokens=4)
    assert isinstance(both, list) and lm.generate("How many", max_new_tokens=4) == both[1]
    drawn = [lm.generate("Tom has", max_new_tokens=8, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_batch_is_that_of_a_run(lm):
    batch = lm.batch(RECORDS)
    assert batch.tokens.shape[0] == 2 and batch.tokens.shape[1] % 16 == 0
    trained = [lm.tokenizer.decode(batch.targets[row][batch.loss_mask[row] > 0]) for row in range(2)]
    assert trained == [f"{record['output']}{lm.tokenizer.eos_token}" for record in RECORDS]
    text = lm.batch(["3 + 4 = 7"])
    assert text.loss_mask.sum() == (text.segment_ids > 0).sum() - 1


def test_a_conversation_is_answered_as_its_template_writes_it(lm):
    from moejax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + '</s>' }}{% endfor %}"
    )
    chatty = replace(lm, tokenizer=tokenizer, template="chat")
    talk = [{"role": "user", "content": "Tom has 3"}, {"role": "assistant", "content": "7"}, {"role": "user", "content": "How many?"}]
    written = "[INST] Tom has 3 [/INST]7</s>[INST] How many? [/INST]"
    assert chatty.chat(talk, max_new_tokens=6) == chatty.generate(written, max_new_tokens=6)
    batch = chatty.batch([{"messages": [*talk, {"role": "assistant", "content": "8"}]}])
    assert tokenizer.decode(batch.targets[0][batch.loss_mask[0] > 0]) == "7</s>8</s>"
    with pytest.raises(UserError, match="last message is to be answered"):
        chatty.chat(talk[:2])


def test_the_loss_and_its_gradients(lm):
    batch = lm.batch(RECORDS)
    summed, _ = by_hand(lm.model, batch)
    loss, grads = moejax.loss_and_grads(lm.model, batch)
    expected = float(summed / batch.loss_mask.sum())
    np.testing.assert_allclose([loss, moejax.loss(lm.model, batch)], expected, rtol=1e-5)
    own, of_own = moejax.loss_and_grads(lm.model, batch, own=by_hand)
    np.testing.assert_allclose(own, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(of_own), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.long
@pytest.mark.parametrize("weights", ["experts", "spread"])
def test_on_a_mesh_it_is_the_same(weights, lm, run, tmp_path):
    """Three rows over two devices: the fourth is padding."""
    there = moejax.load(run, mesh={"devices": 2, "weights": weights})
    assert any(len(a.sharding.device_set) == 2 and not a.is_fully_replicated for a in jax.tree.leaves(nnx.state(there.model)))
    batch = lm.batch(RECORDS[:1] * 3)
    (one, grads), (other, of_mesh) = (moejax.loss_and_grads(each.model, batch) for each in (lm, there))
    np.testing.assert_allclose([other, moejax.loss(there.model, batch)], one, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(of_mesh), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))
    assert there.generate("One and", max_new_tokens=4) == lm.generate("One and", max_new_tokens=4)
    for name, each in (("one", lm), ("other", there)):
        each.save_adapter(tmp_path / name)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_a_mesh_that_a_model_does_not_have(run):
    for source, mesh, told in (
        (ROOT / "assets/tiny-mixtral", {"devices": 2, "weights": "spread"}, "mesh.weights = spread is of frozen weights"),
        (run, {"devices": 3, "weights": "experts"}, "8 experts over 3 devices do not divide"),
        (run, {"devices": 99}, "mesh.devices = 99: expected at most"), (run, {"device": 2}, "mesh.device"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            moejax.load(source, mesh=mesh)


def test_tokens_alone_are_one_sequence_a_row(lm):
    tokens = np.random.default_rng(0).integers(0, 100, (2, 16))
    hidden, _ = lm.model(jnp.asarray(tokens, jnp.int32))
    likely = jax.nn.log_softmax(lm.model.logits(hidden))[:, :-1]
    expected = -np.take_along_axis(np.asarray(likely), tokens[:, 1:, None], -1).mean()
    np.testing.assert_allclose(moejax.loss(lm.model, tokens), expected, rtol=1e-5)


def test_positions_begin_anew_in_every_segment():
    from moejax.models.decoder import positions_of

    found = positions_of(jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 0]]))
    np.testing.assert_array_equal(found, [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 0, 1, 0]])


def test_a_loop_of_ones_own_and_the_adapter_it_saves(tmp_path):
    source = str(ROOT / "assets/tiny-mixtral")
    new = {"rank": 2, "alpha": 4.0}
    lm = moejax.load(source, quantization="nf4", adapter=new)
    batch = lm.batch(RECORDS)
    optimizer = nnx.Optimizer(lm.model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    losses = []
    for _ in range(3):
        loss, grads = moejax.loss_and_grads(lm.model, batch)
        optimizer.update(lm.model, grads)
        losses.append(float(loss))
    after = float(moejax.loss(lm.model, batch))
    assert after < losses[2] < losses[0]
    lm.save_adapter(tmp_path / "adapter")
    again = moejax.load(source, quantization="nf4", adapter=new | {"init_from": str(tmp_path / "adapter")})
    assert float(moejax.loss(again.model, batch)) == after


def test_what_a_caller_brings_is_what_the_config_says_otherwise(make):
    """The same optimizer, loss and batches from outside: the same losses."""
    sections = {"training": {"steps": 3, "gradient_accumulation": 1}, "adapter": {"rank": 2, "alpha": 4.0}, "model": {"aux_loss_coef": 0.0}}
    experiment = make("told", **sections)
    plain = moejax.train(experiment)
    assert plain.steps == 3 and not plain.stopped and (plain.folder / "adapter").is_dir()
    t = experiment.training
    data = load_data(experiment.data, load_tokenizer(experiment.tokenizer), experiment.seed, 10**6)

    def loss(model, batch, **how):
        hidden, stats = model(batch.tokens, batch.segment_ids, batch.positions, **how)
        flat = hidden.reshape(-1, hidden.shape[-1])
        arguments = (model.head_weight.get_value(), batch.targets.reshape(-1), batch.loss_mask.reshape(-1))
        return linear_cross_entropy(1024, 0.0, False, flat, *arguments), stats

    own = moejax.train(
        experiment, {"name": "own"}, loss=loss, optimizer=make_optimizer(t, make_schedule(t, 3)),
        batches=lambda epoch: list(data.train.iterate(epoch)),
    )  # fmt: skip
    np.testing.assert_allclose(own.losses, plain.losses, rtol=1e-5)
    assert "learning_rate" in plain.history[0] and "learning_rate" not in own.history[0]
    np.testing.assert_allclose(
        moejax.loss(plain.load().model, next(data.train.iterate(0))), moejax.loss(own.load().model, next(data.train.iterate(0))), rtol=1e-4
    )


def test_memory_is_the_compilers_here_and_the_closed_forms_elsewhere(make):
    experiment = make()
    found = moejax.estimate_memory(experiment, rows=4)
    sizes = experiment.model.architecture(None)
    assert found.peak_bytes == TrainProgram(experiment, sizes).compile(4, 64).peak_bytes and found.by == "compiler" and found.fits
    config = str(ROOT / "configs/mixtral_8x7b_cs_sparse.yaml")
    one, most = (moejax.estimate_memory(config, gpu="A40", rows=rows, closed_form=True) for rows in (1, None))
    assert one.fits and most.rows > 1 and one.peak_bytes < most.peak_bytes <= most.usable_bytes
    assert not moejax.estimate_memory(config, gpu="RTX-A2000-12", closed_form=True).fits
    config = str(ROOT / "configs/olmoe_1b_7b.yaml")
    given = ((), None), ({"mesh.weights": "whole"}, 8)
    slices = [moejax.estimate_memory(config, changes, gpu="v5e-8", rows=rows, closed_form=True) for changes, rows in given]
    assert [found.gpu for found in slices] == ["v5e-8, spread", "v5e-8, whole"]  # most rows fit by the first
    assert slices[0].rows % 8 == 0 < slices[0].rows and slices[0].usable_bytes == 16911433728 and slices[1].fits


def test_what_a_caller_gets_wrong_is_said(lm, run, make):
    batch = lm.batch(RECORDS)
    for call, message in (
        (lambda: moejax.load(run, adapter={}), "is a run, which says itself how its model is stored"),
        (lambda: moejax.load(ROOT / "assets/tiny-mixtral", base=True), "is not a run"),
        (lambda: moejax.load(ROOT / "assets/tiny-mixtral", quantization="int8"), "expected 'nf4'"),
        (lambda: moejax.load(ROOT / "assets/tiny-mixtral", adapter={"rnk": 2}), "rnk"),
        (lambda: moejax.load(ROOT / "assets/tiny-mixtral").save_adapter("x"), "no adapter"),
        (lambda: moejax.loss(lm.model, np.zeros((2, 16))), "expected integers"),
        (lambda: lm.batch([]), "at least one"),
        (lambda: lm.batch([{"instruction": "a"}]), "record 0"),
        (lambda: lm.generate(""), "empty"),
        (lambda: moejax.train(make(), "training.steps=1"), "expected a mapping"),
        (lambda: moejax.train(make(), {"training.stps": 1}), "stps"),
        (lambda: moejax.train({"name": "x"}), "model"),
        (lambda: moejax.train(make(), batches=[]), "epoch 0 has none"),
        (lambda: moejax.train(make(), batches=[batch, jax.tree.map(lambda a: a[:1], batch)]), "expected 2 rows"),
        (lambda: moejax.train(make(), batches=[jax.tree.map(lambda a: a[:, :15], batch)]), "multiple of 16"),
        (lambda: moejax.estimate_memory(make(), gpu="H1000"), "H1000"),
        (lambda: moejax.estimate_memory(make(), rows=0), "expected 1 or more"),
        (lambda: moejax.estimate_memory(make(), gpu="v5e-9"), "unknown TPU 'v5e-9': did you mean v5e-8"),
        (lambda: moejax.estimate_memory(make(), gpu="v5e-8", rows=3, closed_form=True), "rows = 3: of all 8 devices together"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_the_page_is_that_of_the_docstrings():
    sys.path.insert(0, str(ROOT / "docs"))
    import make_api

    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), "run python docs/make_api.py"


@pytest.mark.long  # .ci/run runs it by itself
def test_the_notebook_runs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs/quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:  # its run goes to a folder that goes with the test
        cell.source = cell.source.replace('"name": "my-run"', f'"name": "my-run", "runs_dir": {str(tmp_path)!r}')
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    losses = [float(line) for output in notebook.cells[3].outputs if output.get("name") == "stdout" for line in output.text.split()]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert "peak_bytes=" in notebook.cells[-1].outputs[0]["data"]["text/plain"]
