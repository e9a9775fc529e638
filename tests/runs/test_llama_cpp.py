"""What llama.cpp itself makes of exported files: logits, tokens, and what its quantizer makes of them."""

import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import NamedTuple

import gguf
import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import ROOT, SHARED, finished_run, full_logits
from tiny_tokenizers import PRE, byte_level

from moejax.data.gguf_tokenizer import metadata
from moejax.data.tokenizer import load_tokenizer
from moejax.hub import gguf_file
from moejax.hub.model import architecture, create_model
from moejax.models.config import LORA_TARGETS, PRESETS
from moejax.models.moe import MoE
from moejax.runs import export
from moejax.runs.open import tuned

pytestmark = pytest.mark.long
PARTS = (
    "the", " Tom's", "DON'T", "we'll", " 1234567", "3.14", "x_1", "  ", "      ", "\n", "\n\n", "\t", "\r\n", "...", "!?", "—", "é",
    "Ärger", " naïve", "日本語", "中文123", " Привет", "مرحبا", "हिन्दी", "🙂", "👩‍👩‍👧", "<b>", "{}[]()", "a=b+c", "</s>",
    "<|im_end|>", "http://a.b/c?d=e", " ", "\u00a0",
    "\ufb01", "²",
)  # fmt: skip


def texts(count=1000):
    """Lines of this project's own pages and code, and pieces of all kinds put together by chance; in NFC, as llama.cpp takes them."""
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/hub.md", "docs/training.md", "docs/data.md", "tests/conftest.py")]
    lines, draw = [line for page in pages for line in page.split("\n") if line.strip()][: count // 2], np.random.default_rng(0)
    mixed = ["".join(draw.choice(PARTS, draw.integers(1, 16))) for _ in range(count - len(lines))]
    return [unicodedata.normalize("NFC", text) for text in [*lines, *mixed]]


def vocabulary(tokenizer, path):
    """llama.cpp's, of a file with this tokenizer."""
    rows = max(tokenizer.get_vocab().values()) + 3
    config = PRESETS["mixtral-tiny"].replace(vocab_size=rows, hidden_size=32, num_layers=1, num_experts=2)
    shapes = {(place.path, place.attr): config.weights[(*place.path, place.attr)] for (place,) in gguf_file.tensors(config).values()}

    def value(name):
        (place,) = gguf_file.tensors(config)[name]
        return np.zeros(shapes[place.path, place.attr][(place.layer is not None) + (place.expert is not None) :], np.float32)

    gguf_file.write(path, config, "f16", value, metadata(tokenizer, rows, [tokenizer.eos_token_id]))
    return llama_cpp.load(path)


def assert_same_ids(tokenizer, path):
    model, backend = vocabulary(tokenizer, path), tokenizer.backend_tokenizer
    different = [text for text in texts() if llama_cpp.encode(model, text) != backend.encode(text).ids]
    assert not different, f"{len(different)} of 1000 texts, first {different[0]!r}"


@pytest.mark.parametrize("file", ["mistral_v1_tokenizer.json", "20B_tokenizer.json"])
def test_tokens_of_real_tokenizers(file, tmp_path):
    path = SHARED / "tokenizers" / file
    if not path.is_file():
        pytest.skip(f"there is no {file} in ../shared/tokenizers (Mixtral's, GPT-NeoX-20B's tokenizer.json)")
    assert_same_ids(load_tokenizer(str(path)), tmp_path / "m.gguf")


@pytest.mark.parametrize("pre", PRE)
def test_tokens_of_every_pre_tokenizer_that_is_written(pre, tmp_path):
    assert_same_ids(byte_level(pre, 2000, texts(4000)), tmp_path / "m.gguf")


def test_tokens_that_a_run_added(tmp_path):
    path = SHARED / "tokenizers" / "mistral_v1_tokenizer.json"
    if not path.is_file():
        pytest.skip("there is no mistral_v1_tokenizer.json in ../shared/tokenizers")
    assert_same_ids(load_tokenizer(str(path), ["<|im_start|>", "<|im_end|>"]), tmp_path / "m.gguf")


def random_folder(config, folder):
    """A model of random weights in Hub layout, of which every token has something to choose from."""
    draw, tensors = np.random.default_rng(5), {}
    for name, (place,) in gguf_file.tensors(config).items():
        shape = config.weights[(*place.path, place.attr)][(place.layer is not None) + (place.expert is not None) :]
        value = draw.standard_normal(shape, np.float32)
        scaled = 1 + 0.1 * value if len(shape) == 1 else value / np.sqrt(shape[-1]) * (3 if "gate.weight" in name else 1)
        tensors[name] = scaled.astype(jnp.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hub_config()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "assets/tiny-mixtral" / name).read_bytes())
    return folder


OLMOE = PRESETS["olmoe-tiny"].replace(hidden_size=256, intermediate_size=256, head_dim=64, num_layers=2, num_experts=8)
QWEN3 = PRESETS["qwen3-moe-tiny"].replace(head_dim=24, num_heads=6, num_kv_heads=3, num_layers=2, tie_word_embeddings=True)
BASES = {
    "mixtral": ROOT / "assets/tiny-mixtral",
    "qwen3": ROOT / "assets/tiny-qwen3-moe",
    "olmoe": OLMOE,
    "olmoe, tied": OLMOE.replace(tie_word_embeddings=True, rms_norm_eps=1e-3),
    "qwen3, tied, other heads": QWEN3,
    "mixtral, all experts": PRESETS["mixtral-tiny"].replace(experts_per_token=8, head_dim=16, num_layers=2),
}


LENGTH = 4


class Asked(NamedTuple):
    """A run, 50 texts, and what it answers: fp32 [50, T, V]."""

    folder: Path
    texts: np.ndarray
    logits: np.ndarray


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    @cache
    def ask(name):
        """The 50 of 8,000 pieces of text whose routing is clearest: where two experts are as good as equal, any rounding chooses between
        them, and neither answer is wrong."""
        folder = tmp_path_factory.mktemp("llama")
        base = BASES[name] if isinstance(BASES[name], Path) else random_folder(BASES[name], folder / "base")
        adapter = {"rank": 2, "alpha": 0.5, "targets": list(LORA_TARGETS)}
        experiment = finished_run(folder / "run", model={"source": str(base)}, adapter=adapter)
        sizes = architecture(experiment, base)
        model = tuned(experiment, sizes, folder / "run", create_model(experiment, sizes, base))
        tokenizer, draw = load_tokenizer(str(base)), np.random.default_rng(1)
        written = [f"[INST] {r['instruction']} [/INST] {r['output']}" for r in json.loads((ROOT / "assets/problems/test.json").read_text())]
        ids = np.concatenate([tokenizer.encode(text) for text in written])
        pieces = np.stack([ids[at : at + LENGTH] for at in draw.integers(0, len(ids) - LENGTH, 8000)]).astype(np.int32)
        seen, choose = [], MoE.choose

        def noted(self, probabilities):
            jax.debug.callback(lambda p: seen.append(np.asarray(p)), probabilities, ordered=True)
            return choose(self, probabilities)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MoE, "choose", noted)
            out = full_logits(model, pieces, np.ones_like(pieces), np.broadcast_to(np.arange(LENGTH, dtype=np.int32), pieces.shape))
            jax.effects_barrier()
        k = sizes.experts_per_token
        ranked = [-np.sort(-np.log(p.reshape(*pieces.shape, -1))) for p in seen]
        clear = np.min([(r[..., k - 1] - r[..., k]).min(-1) for r in ranked], axis=0) if ranked else np.ones(len(pieces))
        best = np.argsort(-clear)[:50]
        return Asked(folder / "run", pieces[best], out[best])

    return ask


def answered(run, kind, target):
    export.export(run, target, "gguf", False, None, None, kind, False)
    (path,) = target.glob("*.gguf")
    return path


@pytest.mark.parametrize("name", BASES)
def test_logits(name, asked, tmp_path):
    run, pieces, ours = asked(name)
    theirs = np.stack(list(llama_cpp.logits(llama_cpp.load(answered(run, "f16", tmp_path / "f16")), pieces)))
    assert np.abs(ours).max() > 1 and np.abs(theirs - ours).max() < 2e-2


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "olmoe"])
def test_choices_in_q8_0(name, asked, tmp_path):
    run, pieces, ours = asked(name)
    theirs = np.stack(list(llama_cpp.logits(llama_cpp.load(answered(run, "q8_0", tmp_path / "q8_0")), pieces)))
    ranked = np.sort(ours, -1)
    leads = ranked[..., -1] - ranked[..., -2] > 0.1
    assert leads.sum() > 100 and (theirs.argmax(-1) == ours.argmax(-1))[leads].all()


def test_llama_cpps_own_quantizer(asked, tmp_path):
    """The recipe of docs/hub.md."""
    run, pieces, ours = asked("olmoe")
    llama_cpp.quantize(answered(run, "f16", tmp_path / "f16"), tmp_path / "q4.gguf")
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "q4.gguf").tensors}
    assert {"Q4_K", "Q6_K", "F32"} <= kinds
    theirs = np.stack(list(llama_cpp.logits(llama_cpp.load(tmp_path / "q4.gguf"), pieces)))
    assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.98
