"""JSON and YAML of users and of runs: what they are instead is one message, through whichever door they come."""

import json
import shutil

import pytest
from support import ROOT

from moejax import gpus
from moejax.data.ends import ends_of
from moejax.data.tokenizer import load_tokenizer
from moejax.documents import read_json
from moejax.errors import UserError
from moejax.estimator import coefficients, comparison
from moejax.profiling import schema
from moejax.yaml_file import read_yaml

FAULTS = {
    b"": "empty",
    b'{"a": [1,': "line 1",
    b"[" * 99999: "nested too deeply|recursion",
    b'{"schema_version": ' + b"9" * 5000 + b"}": "limit",
    b"[]": "list",
    b"null": "NoneType",
    b"\xff\xfe\x00": "not UTF-8|codec",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "is a Git LFS pointer",
}


@pytest.mark.parametrize(("content", "told"), FAULTS.items(), ids=lambda value: str(value)[:20])
def test_what_is_no_json_object(content, told, tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_bytes(content)
    (tmp_path / "prediction.json").write_bytes(content)

    class Tokenizer:
        eos_token_id = 2

    for reader in (
        read_json, coefficients.read, schema.read,
        lambda p: comparison.read_prediction(p.parent), lambda p: ends_of(Tokenizer(), "mistral", p.parent),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told) as caught:
            reader(path)
        assert str(tmp_path) in str(caught.value) and "sys." not in str(caught.value)


def test_the_remedy_is_a_sentence_of_its_own(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"--x .*a\.json, line 1: no whole JSON .*: was it cut off\? Write `A` again$"):
        read_json(tmp_path / "a.json", "--x ", "write `A` again")


def test_yaml_with_merged_keys(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb:\n  <<: *a\n  x: 2\n", encoding="utf-16")
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"x": 1}, "b": {"x": 2}}


GOOD = {"memory_gb": 24, "bandwidth_gb_per_second": 320, "bf16_tflops": 65}


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"memory_gb": None}, "memory_gb = None: expected a number above 0"),
        ({"memory_gb": 10**400}, "memory_gb = 10000"),
        ({"bf16_tflops": 1e300}, r"bf16_tflops = 1e\+300: expected"),
        ({"bandwidth_gb_per_second": 1e-300}, "as on its data sheet"),
        ({"compute_capability": 7.5, "multiprocessors": 40, "l2_mb": 4, "clock_ghz": 1.6, "bf16": True}, "7.5 has no bf16"),
    ],
)
def test_cards_that_cannot_be_meant(figures, told, tmp_path):
    text = ", ".join(f"{key}: {'null' if value is None else str(value).replace('e', '.0e')}" for key, value in (GOOD | figures).items())
    text = text.replace("Tru.0e", "true").replace("b.0e", "be")
    (tmp_path / "a.yaml").write_text(f"MINE: {{{text}}}\n")
    with pytest.raises(UserError, match=told):
        gpus.from_yaml(tmp_path / "a.yaml")


def test_an_old_card_has_no_bf16_whether_it_is_said_or_not(tmp_path):
    more = ", compute_capability: {}, multiprocessors: 40, l2_mb: 4, clock_ghz: 1.6}}\n"
    base = "{memory_gb: 24, bandwidth_gb_per_second: 320, bf16_tflops: 65"
    (tmp_path / "a.yaml").write_text(f"OLD: {base}{more.format(7.5)}NEW: {base}{more.format(8.6)}BARE: {base}}}\n")
    table = gpus.from_yaml(tmp_path / "a.yaml")
    assert [table[name].bf16 for name in ("OLD", "NEW", "BARE")] == [False, True, True]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "told"),
    [(b"[" * 99999, "nested too deeply"), (b"{", "no whole JSON"), (b"\xef\xbb\xbf{}", "begins with a byte-order mark")],
)
def test_the_file_of_a_tokenizer_that_is_none_is_named(name, content, told, tmp_path):
    shutil.copytree(ROOT / "assets/tiny-mixtral", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{told}"):
        load_tokenizer(str(tmp_path))


def test_each_number_that_was_written_is_what_is_read(tmp_path):
    """One changed digit is noticed; what has no hash (another tool's, an older version's) is read."""
    path = tmp_path / "c.json"
    coefficients.write(path, coefficients.study()[:1])
    assert coefficients.read(path)[0].named == coefficients.study()[0].named
    content = json.loads(path.read_text())
    content["entries"][0]["points"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"c\.json is not what was written there \(sha256\)"):
        coefficients.read(path)
    del content["sha256"]
    path.write_text(json.dumps(content))
    coefficients.read(path)
