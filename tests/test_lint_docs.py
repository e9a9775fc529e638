"""tests/lint_docs.py: what `make lint` says of a page."""

import lint_docs
import pytest

PAGE = """# A page

See [here](#a-page), [there](page.md#nowhere) and [gone](gone.md). It tells; `python estimate.py memory
CONFIG --gpus A40` and `make tset`.

```
moejax trian my.yaml
moejax train my.yaml training.stepz=4 data.source=FILE   # --rows in a comment
cd x && moejax export runs/demo --out DIR --form gguf
python benchmarks/gone.py; python train.py --config configs/gone.yaml [--dry-run] model.preset=x
python benchmarks/floors.py --config configs/demo.yaml \\
  --tflop 3
```
"""


def test_it_names_what_does_not_exist(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    told = "".join(f"{number}: {what}\n" for number, what in lint_docs.found(tmp_path / "page.md"))
    expected = [
        (3, "'tells': docs/style.md has another word"), (3, "page.md#nowhere: no such heading"), (3, "gone.md: no such file"),
        (3, "--gpus: no such option"), (4, "make tset: no such target"), (7, "trian: no such command"),
        (8, "training.stepz: no such key of the config"), (9, "--form: no such option"), (10, "benchmarks/gone.py: no such file"),
        (10, "configs/gone.yaml: no such file"), (11, "benchmarks/floors.py --tflop: no such option"),
    ]  # fmt: skip
    for number, what in expected:
        assert any(line.startswith(f"{number}: ") and line.endswith(what) for line in told.splitlines()), (what, told)
    assert len(set(told.splitlines())) <= len(expected) + 1  # a file that is missing may be named twice


@pytest.mark.parametrize(
    "command",
    [
        "moejax train CONFIG [key.sub=value …] [--resume]",
        "moejax generate assets/tiny-mixtral --prompt 'a=b' --seed 1",
        "make PYTHON=python3.12 demo",
        ".venv-reference5/bin/python tests/oracles/families.py CASE",
        "pip install -e '.[cuda12]'",
        "moejax init my.yaml --model mixtral_8x7b",
    ],
)
def test_it_is_silent_on_what_works(command, tmp_path):
    (tmp_path / "page.md").write_text(f"```\n{command}\n```\n")
    assert not [*lint_docs.found(tmp_path / "page.md")]
