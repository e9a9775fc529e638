"""Where things lie, and how tensors are compared."""

import json
import struct
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial, reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx
from safetensors.numpy import load_file, save_file

from moejax.config import Experiment, dump
from moejax.data.batch import Batch
from moejax.hub import layerwise
from moejax.hub.model import architecture, create_model
from moejax.hub.names import modules, tensors
from moejax.hub.peft import adapted, save_adapter
from moejax.hub.weights import attribute
from moejax.models.cache import decode_step, prefill
from moejax.models.config import LORA_TARGETS, BlackMambaConfig
from moejax.training.program import split
from moejax.training.step import Objective, sums

ROOT = Path(__file__).parent.parent
VECTORS = ROOT / "tests" / "vectors"
SHARED = ROOT.parent / "shared"
EXPERIMENTS = (
    "largest_batch", "stages", "layers", "kernels", "throughput", "utilization", "expert_load", "length", "fit_batch", "fit_throughput",
    "cost",
)  # fmt: skip
"""Of a whole study: a section of its page each."""


def read_vectors(name):
    """The arrays of a file of PyTorch's."""
    with np.load(VECTORS / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def batch_of(known):
    """The right-padded, prompt-masked batch of a vectors' file in our form."""
    ids, mask, labels = (known[name] for name in ("ids", "mask", "labels"))
    targets, loss_mask = np.zeros_like(ids), np.zeros(ids.shape, np.float32)
    targets[:, :-1], loss_mask[:, :-1] = ids[:, 1:], labels[:, 1:] != -100
    arrays = (ids, targets, loss_mask, mask, np.arange(ids.shape[1])[None] * mask)
    return Batch(*(jnp.asarray(a, jnp.float32 if a is loss_mask else jnp.int32) for a in arrays))


def hub_folder(known, folder):
    """The weights of a vectors' file as a folder in Hub layout."""
    stored = json.loads(str(known["config"]))
    config = BlackMambaConfig(**stored).to_hub_config() if stored.pop("dt_rank", None) else stored | {"model_type": "mixtral"}
    folder.mkdir(exist_ok=True)
    weights = {name[2:]: np.ascontiguousarray(value) for name, value in known.items() if name.startswith("w/")}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hub_arrays(model):
    """Hub name -> array, from the variables of a model (weights, or gradients in their places)."""
    for name, places in tensors(model.config).items():
        parts = []
        for p in places:
            value = getattr(attribute(model, p.path), p.attr).get_value()
            parts.append(np.asarray(value[tuple(i for i in (p.layer, p.expert) if i is not None) or ...]))
        array = np.concatenate(parts)
        yield name, array[:, None] if name.endswith("conv1d.weight") else array


def adapter_tensors(model):
    """PEFT's name -> array, for the adapters (or their gradients) inside a model."""
    out = {}
    for name, place in modules(model.config).items():
        lora = getattr(reduce(getattr, place.path, model), "lora", None)
        if lora is not None:
            index = (place.layer,) if place.expert is None else (place.layer, place.expert)
            for letter, variable in (("A", lora.a), ("B", lora.b)):
                out[f"base_model.model.{name}.lora_{letter}.weight"] = variable.get_value()[index]
    return out


def hub_tensor(tree_model, place):
    """The array of a model (weights or gradients in its place) at a Hub tensor's place."""
    value = getattr(reduce(getattr, place.path, tree_model), place.attr).get_value()
    index = tuple(i for i in (place.layer, place.expert) if i is not None)
    return value[index] if index else value


def assert_close_to_largest(ours, reference, tolerance, what):
    """Every element within `tolerance` of the reference's largest magnitude."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    largest = np.abs(reference).max()
    difference = np.abs(ours - reference).max()
    assert difference <= tolerance * max(largest, 1e-12), f"{what}: differs by {difference:.3g}, largest {largest:.3g}"


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, arguments):
    model = nnx.merge(graphdef, state)
    return model.logits(model(*arguments)[0])


def full_logits(model, *arguments):
    """The logits of a full pass, in one compiled program for each kind of model and shape."""
    return np.asarray(_logits(*nnx.split(model), arguments))


@partial(jax.jit, static_argnums=0)
def _begin(graphdef, state, arguments):
    return prefill(nnx.merge(graphdef, state), *arguments)


@partial(jax.jit, static_argnums=0)
def _go_on(graphdef, state, arguments):
    return decode_step(nnx.merge(graphdef, state), *arguments)


def decoder(model):
    """(prefill, decode_step) of a model, compiled."""
    graphdef, state = nnx.split(model)
    return lambda *rest: _begin(graphdef, state, rest), lambda *rest: _go_on(graphdef, state, rest)


@partial(jax.jit, static_argnums=0)
@partial(jax.value_and_grad, argnums=1, has_aux=True)
def _mean(objective, trainable, frozen, batch):
    total, (_, stats) = sums(objective, trainable, frozen, batch, None)
    return total / batch.loss_mask.sum(), stats


def loss_and_gradients(model, batch, full=True, **settings):
    """Mean loss, routing statistics and all gradients (in a model's places) of the training objective; full: of all weights."""
    graphdef, trainable, frozen = split(model, full=full)
    (loss, stats), gradients = _mean(Objective(graphdef, full=full, chunk_tokens=16, **settings), trainable, frozen, batch)
    return loss, stats, nnx.merge(graphdef, gradients, frozen)


def assert_trains_as_fused(model, batch, case, folder):
    """A model with PEFT's fused adapter against tests/vectors/lora_fused.npz: logits, loss, and every gradient in PEFT's layout."""
    vectors = {name.removeprefix(f"{case}/"): v for name, v in read_vectors("lora_fused").items() if name.startswith(f"{case}/")}
    real = np.asarray(batch.segment_ids) > 0
    logits = full_logits(model, batch.tokens, batch.segment_ids, batch.positions)
    np.testing.assert_allclose(logits[real], vectors["logits"][real], rtol=0, atol=2e-5)
    loss, _, gradients = loss_and_gradients(model, batch, full=False, remat="full")
    np.testing.assert_allclose(loss, vectors["losses"][0], rtol=1e-6)
    save_adapter(gradients, folder, "base", fused=True)
    ours = load_file(str(folder / "adapter_model.safetensors"))
    expected = {name.removeprefix("grad/"): value for name, value in vectors.items() if name.startswith("grad/")}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert_close_to_largest(ours[name], value, 2e-5, name)


TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
}


def tiny_experiments(folder):
    """make(section={field: value}) -> Experiment on the bundled problems, whose runs lie in `folder`."""
    problems = json.loads((ROOT / "assets/problems/train.json").read_text())[:60]
    data = folder / "train.json"
    data.write_text(json.dumps(problems))

    def make(name="run", **sections):
        content = {
            "name": name,
            "runs_dir": str(folder / "runs"),
            "model": {"preset": "mixtral-tiny", "overrides": TINY, "aux_loss_coef": 0.01},
            "quantization": {"format": "nf4"},
            "adapter": {"rank": 2, "alpha": 4.0},  # dropout takes the compiler three times as long
            "tokenizer": str(ROOT / "assets/tiny-mixtral/tokenizer.json"),
            "data": {"source": str(data), "row_tokens": 64, "max_length": 64, "batch_rows": 4, "holdout": 8},
            "training": {
                "steps": 20,
                "learning_rate": 1e-2,
                "schedule": "constant",
                "compute_dtype": "float32",
                "gradient_accumulation": 2,
            },
        }
        for section, changes in sections.items():
            content[section] = changes if changes is None else content.get(section, {}) | changes
        return Experiment.model_validate(content)

    return make


def finished_run(folder, **sections):
    """A run's folder as training leaves it: the bundled Mixtral in NF4 and an adapter on everything whose B is drawn at random."""
    content = {
        "name": folder.name,
        "runs_dir": str(folder.parent),
        "model": {"source": str(ROOT / "assets/tiny-mixtral")},
        "quantization": {"format": "nf4"},
        "adapter": {"rank": 2, "alpha": 4.0, "targets": list(LORA_TARGETS)},
        "data": {"source": str(ROOT / "assets/problems/train.json")},
        "training": {"steps": 1, "compute_dtype": "float32"},
    }
    experiment = Experiment.model_validate(content | sections)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(experiment))
    if experiment.adapter is not None:
        (folder / "adapter").mkdir()
        for name, data in _adapter(dump(experiment.model_copy(update={"name": "any", "runs_dir": "any"}))).items():
            (folder / "adapter" / name).write_bytes(data)
    return experiment


@cache
def _adapter(text):
    """The files of a config's adapter, by name: one of A drawn as training begins with it, and B too."""
    experiment = Experiment.model_validate(yaml.safe_load(text))
    source = Path(experiment.model.source or ROOT / "assets/tiny-mixtral")
    model = create_model(experiment, architecture(experiment, source), source)
    for index, lora in enumerate({id(lora): lora for _, lora in adapted(model).values()}.values()):
        lora.b.set_value(0.1 * jax.random.normal(jax.random.key(index), lora.b.get_value().shape))
    for rows in filter(None, (model.embed_rows, model.head_rows)):
        rows.rows.set_value(0.1 * jax.random.normal(jax.random.key(7), rows.rows.get_value().shape))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "adapter", str(source))
        return {path.name: path.read_bytes() for path in (Path(folder) / "adapter").iterdir()}


def save_torch(path, tensors):
    """A state_dict as torch.save writes it, by hand: a zip of a pickle and of every tensor's numbers."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def sizes(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    kinds = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        pickled = b"\x80\x02}"
        for key, (name, value) in enumerate(tensors.items()):
            storage = b"(" + text("storage") + f"ctorch\n{kinds[str(value.dtype)]}\n".encode() + text(str(key)) + text("cpu")
            storage += b"J" + struct.pack("<i", value.size) + b"tQ"
            strides = [stride // value.itemsize for stride in value.strides]
            arguments = storage + b"K\x00" + sizes(value.shape) + sizes(strides) + b"\x89ccollections\nOrderedDict\n)R"
            pickled += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs"
            file.writestr(f"archive/data/{key}", np.ascontiguousarray(value).tobytes())
        file.writestr("archive/data.pkl", pickled + b".")


def ended(started, seconds=900):
    """[(exit code, standard output, standard error)] of processes that wait for each other. All are read at once, since one whose pipe is
    full waits too, and none is left behind."""
    try:
        with ThreadPoolExecutor(len(started)) as pool:
            said = list(pool.map(lambda process: process.communicate(timeout=seconds), started))
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def kept_result(name):
    """The newest of benchmarks/results under this name."""
    return json.loads(max((ROOT / "benchmarks" / "results").glob(f"*-{name}.json")).read_text())


def walked_logits(sizes, folder, tokens, adapters=(), advance=lambda: None, **arguments):
    """fp32 [T, V] of `tokens` (int32 [T]) by the checkpoint in `folder`, once for each adapter (or once), a layer at a time in memory."""
    with ExitStack() as stack:
        walk = layerwise.Walk(layerwise.Checkpoint(sizes, folder, adapters, arguments), tokens, stack)
        for layer in range(walk.layers):
            walk.read(layer)
            for model in range(len(walk.streams)):
                walk.step(model)
            advance()
        walk.end()
        return [walk.logits(model) for model in range(len(walk.streams))]
