"""`moejax init`: write a commented config for your own data, based on the configs in `configs/` that use `my_data.jsonl`."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
from pathlib import Path

from moejax import installation
from moejax.errors import UserError
from moejax.files import meant

_DATA, _MODEL, _TOKENIZER = "my_data.jsonl", "mixtral_8x7b", "tokenizer.json"
_SMALL, _BYTES_PER_TOKEN = 20_000_000, 4  # larger files are not read; English text has some 4 bytes a token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="finetune.yaml", metavar="CONFIG.yaml", help="file to write (default: finetune.yaml)")
    parser.add_argument("--model", default=_MODEL, metavar="NAME", help="a Hub id, a model folder, or a bundled config: "
        f"{_MODEL} (default), qwen3_30b_a3b_24gb, olmoe_1b_7b, blackmamba_2.8b, mixtral_tiny (random weights, for a CPU), …")  # fmt: skip
    parser.add_argument("--data", default=_DATA, metavar="FILE", help=f"training data: a file or a folder (default: {_DATA})")


def run(options: argparse.Namespace) -> int:
    """Write the config, and the tokenizer of bytes where it has one. Raises UserError where a file would be replaced, and for data
    that are no records."""
    file = Path(options.config)
    text = written(file, options.model, options.data)
    tokenizer = file.parent / _TOKENIZER if f"\ntokenizer: {_TOKENIZER}" in text else None
    for path in (file, tokenizer):
        if path is not None and path.exists():
            raise UserError(f"{path} is there already: nothing is replaced; give another name, or another folder")
    text = _fitted(text, Path(options.data))
    file.parent.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        from moejax.data.tokenizer import byte_tokenizer

        byte_tokenizer().save(str(tokenizer))
        text = text.replace(f"\ntokenizer: {_TOKENIZER}", f"\ntokenizer: {_scalar(str(tokenizer))}")
    file.write_text(text, encoding="utf-8")
    missing = "" if Path(options.data).exists() else f", which is not there yet{meant(Path(options.data))}"
    print(f"{file}: trains {options.model} on {options.data}{missing}; look through it, then")
    for command, what in (
        (f"moejax data {file}", "columns, counts, three records with what is trained on marked"),
        (f"moejax train {file} --dry-run", "parameters, memory, schedule; loads nothing"),
        (f"moejax estimate memory {file}", "the largest batch on which GPU"),
        (f"moejax train {file}", ""),
    ):
        print(f"  {command:<50}{what}".rstrip())
    return 0


def written(file: Path, model: str, data: str) -> str:
    """The config's text. Raises UserError for a name that is no model's."""
    shipped = {path.stem: content for path in sorted(installation.CONFIGS.glob("*.yaml"))
               if _DATA in (content := path.read_text(encoding="utf-8"))}  # fmt: skip
    text = shipped.get(model.replace("-", "_"))
    if text is None and "/" not in model and not Path(model).is_dir():
        near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(model.replace("-", "_"), shipped, n=1))
        raise UserError(f"--model {model}: expected a Hub id (with a /), a folder that exists, or one of {', '.join(shipped)}{near}")
    if text is None:  # another model's sizes are in its config.json, its adapter has its family's targets, its tokenizer its template
        text = re.sub(r"\n  (targets|template): [^\n]*", "", shipped[_MODEL].partition("\n")[2])
        text = re.sub(r"\n  source: [^\n]*\n  preset: [^\n]*", lambda _: f"\n  source: {_scalar(model)}", text, count=1)
        text = f"# QLoRA fine-tuning of {model}.\n{text}"
    name = re.sub(r"[^A-Za-z0-9._-]", "_", file.stem).lstrip(".-") or "run"
    text = re.sub(r"^name: .*", f"name: {_scalar(name)}  # the run's folder is runs/{name}", text, count=1, flags=re.MULTILINE)
    return text.replace(f"source: {_DATA}  # yours", f"source: {_scalar(data)}")


def _fitted(text: str, data: Path) -> str:
    """With a hold-out, a warm-up and evaluations that a small file leaves room for, and a template that its conversations need.

    A file that is missing or larger than `_SMALL` leaves the text as it is, and so does one whose columns are not known: that is reported.
    Raises UserError for a file that holds no records, with the line.
    """
    import yaml

    from moejax import config
    from moejax.data import places
    from moejax.data.columns import PAIRS_OF_ANSWERS
    from moejax.data.sources import of_records
    from moejax.data.tokenizer import load_tokenizer
    from moejax.estimator.units import counted

    if not data.is_file() or data.stat().st_size > _SMALL:
        return text
    said = yaml.safe_load(text)
    found = [record for part in places.read(str(data), None, None, "--data").parts for record in part.records]
    if not found:
        raise UserError(f"{data} holds no records: expected one JSON object a line, a JSON list, CSV, Parquet or Arrow")
    keys = {str(key).strip().lower() for key in found[0]} if isinstance(found[0], dict) else set()
    if any(keys.issuperset(sides) for sides in PAIRS_OF_ANSWERS):
        print(f"note: {data} holds pairs of answers: `preference: {{}}` trains on both (docs/data.md); without it one is trained on")
    try:
        records = of_records(found, config.DataConfig.model_validate({"source": str(data)}), str(data))
    except UserError as error:
        print(f"note: {error}")
        return text
    held = min(said["data"].get("holdout", 0), len(records) // 10)
    rows = math.ceil(data.stat().st_size / _BYTES_PER_TOKEN / said["data"]["row_tokens"])
    training = said["training"]
    steps = training.get("steps") or training["epochs"] * math.ceil(rows / said["data"]["batch_rows"])
    fitting: dict[str, int | str] = {"holdout": held}
    if every := said.get("checkpoint", {}).get("every"):
        fitting["every"] = min(every, steps)
    fitting["warmup_steps"] = min(training.get("warmup_steps", 0), steps // 10)
    fitting["eval_every"] = min(training.get("eval_every") or steps, max(1, steps // 4)) if held else "null"
    named = ", ".join({"every": "checkpoint.every"}.get(key, key) for key in fitting if f"\n  {key}: " in text)
    fit = f"# {named}: chosen for about {counted(steps, 'step')}, which {data.name} gives now; with more data, raise them"
    text = text.replace("\ntraining:\n", f"\n{fit}\ntraining:\n", 1) if named else text
    for key, value in fitting.items():
        text = re.sub(rf"^(  {key}:) \S+", rf"\1 {value}", text, count=1, flags=re.MULTILINE)
    model = said["model"].get("source")
    if "conversation" in records[0] and "template" not in said["data"] and model is not None and Path(model).is_dir():
        try:
            own = load_tokenizer(model).chat_template
        except UserError:
            return text
        if own is None:
            text = text.replace("\n  holdout:", "\n  template: mistral  # this tokenizer has no chat template of its own\n  holdout:", 1)
    return text


def _scalar(text: str) -> str:
    """As YAML has it, in quotes where it needs them."""
    import yaml

    try:
        plain = yaml.safe_load(f"x: {text}") == {"x": text}
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)
