"""The model card of an export (README.md, as the Hub reads it): what the run's own records say, and nothing that they do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moejax import __version__, json_lines
from moejax.config import Experiment
from moejax.data.places import is_file
from moejax.documents import read_json
from moejax.errors import UserError
from moejax.files import replace_text
from moejax.models.config import Architecture

Row = tuple[str, ...]


def write(target: Path, use: str, folder: Path, experiment: Experiment, sizes: Architecture, base: Path) -> None:
    """Write README.md of the adapter or merged model in `target`, which the run in `folder` trained.

    use: what loads it, in Markdown. base: the base model's folder, whose card may name its licence. Raises OSError.
    """
    sections = {
        "Use": use,
        "Data": _data(experiment, folder),
        "Training": table(("setting", "value"), _settings(experiment, sizes)),
        "Scores": table(("measured", "value"), _scores(experiment, folder)),
    }
    adapter, source = (target / "adapter_config.json").is_file(), experiment.model.source
    began = f"random weights ({experiment.model.preset})" if source is None else f"`{place_name(source)}`"
    first = f"A LoRA adapter for {began} ({sizes.title}), trained" if adapter else f"A model ({sizes.title}), trained from {began}"
    text = [_front(experiment, sizes, base, adapter).strip(), f"# {folder.resolve().name}", f"{first} with moejax {__version__}."]
    text += [f"## {title}\n\n{content}" for title, content in sections.items() if content]
    replace_text(target / "README.md", "---\n" + "\n\n".join([f"{text[0]}\n---", *text[1:]]) + "\n")


def use(kind: str, sizes: Architecture, base: str, name: str, experts_per_token: int | None, served: str | None) -> str:
    """How an export of this kind ("peft", "fused", "merged") under this name is loaded. base: the Hub's id, or where a reader puts the
    folder; experts_per_token: where the run had another number than its base; served: a server's command."""
    if served is not None:
        return f"```\n{served}\n```"
    if "architectures" not in sizes.to_hub_config():
        return ""  # transformers has no such family
    lines, load = ["from transformers import AutoModelForCausalLM, AutoTokenizer"], "AutoModelForCausalLM.from_pretrained"
    if kind == "merged":
        lines += ["", f'model = {load}("{name}", dtype="auto")', f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
        return "\n".join(["```python", *lines, "```"])
    k = "" if experts_per_token is None else f", num_experts_per_tok={experts_per_token}"
    lines = ["from peft import PeftModel", *lines, "", f'model = {load}("{base}", dtype="auto"{k})']
    if sizes.new_rows:
        lines.append(f"model.resize_token_embeddings({sizes.vocab_size})")
    lines.append(f'model = PeftModel.from_pretrained(model, "{name}")')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name if sizes.new_rows else base}")')
    needs = "transformers 5 and PEFT 0.19 or later" if kind == "fused" else "PEFT 0.18 on transformers 4, or PEFT 0.21 on transformers 5"
    return "\n".join(["```python", *lines, "```", "", f"With {needs}."])


def table(columns: Row, rows: Iterable[Row]) -> str:
    """Markdown; nothing without rows."""
    lines = [f"| {' | '.join(cell.replace('|', '&#124;').replace(chr(10), ' ') for cell in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines]) if lines else ""


def _front(experiment: Experiment, sizes: Architecture, base: Path, adapter: bool) -> str:
    """The YAML that the Hub reads. A base and data that lie in files have no name there."""
    from huggingface_hub import ModelCardData

    source = experiment.model.source
    hub = None if source is None or Path(source).is_dir() else source.partition("@")[0]
    tags = ["moejax", "moe", *([experiment.method] if adapter else []), *([] if experiment.preference is None else ["dpo"])]
    library = "peft" if adapter else "transformers" if "architectures" in sizes.to_hub_config() else None
    more: dict[str, Any] = _licence(base)
    if hub is not None:
        more |= {"base_model": hub, "base_model_relation": "adapter" if adapter else "finetune"}
    named = [one.source for one in experiment.data.sources if not is_file(one.source)]
    if named:
        more["datasets"] = sorted(set(named))
    return ModelCardData(library_name=library, pipeline_tag="text-generation", tags=tags, **more).to_yaml()


def _licence(base: Path) -> dict[str, str]:
    """What the front matter of the base's own card says of its licence."""
    import yaml
    from huggingface_hub import metadata_load

    card = base / "README.md"
    try:
        said = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        said = None
    keys = ("license", "license_name", "license_link")
    return {key: said[key] for key in keys if isinstance(said.get(key), str)} if isinstance(said, dict) else {}


def place_name(place: str) -> str:
    """What others are told of it: a Hub id, or a name for `datasets`; of a file or folder the last part alone."""
    return place.rstrip("/").rpartition("/")[2] if Path(place).exists() or is_file(place) else place


def base_name(source: str) -> str:
    """What a command in the card calls the base: its Hub id; of a folder a place to fill in."""
    return f"path/to/{place_name(source)}" if Path(source).exists() else source


def _data(experiment: Experiment, folder: Path) -> str:
    data = experiment.data
    rows = [
        (f"`{place_name(one.source)}`", "" if is_file(one.source) else str(one.split), f"{one.weight:g}") for one in data.sources
    ]
    steps = {r["step"]: r for r in _records(folder) if "step_seconds" in r}
    counts = ""
    if steps:
        total = {name: sum(r[name] for r in steps.values()) for name in ("queries", "real_tokens", "supervised_tokens")}
        counts = (
            f"{len(steps):,} steps ({steps[max(steps)]['epoch']:.3g} epochs) saw {total['queries']:,} queries of {total['real_tokens']:,} "
            f"tokens, of which {total['supervised_tokens']:,} were trained on."
        )
    return "\n\n".join(part for part in (table(("source", "split", "weight"), rows), counts) if part)


def _settings(experiment: Experiment, sizes: Architecture) -> Iterator[Row]:
    """The essentials of config.yaml, targets by the names in the family's checkpoints."""
    e, t, d = experiment, experiment.training, experiment.data
    stored = f" over 4-bit ({e.quantization.format}) weights" if e.quantization.format != "none" else ""
    yield "method", "all weights" if e.adapter is None else f"LoRA{stored}"
    if e.adapter is not None:
        yield "rank, alpha, dropout", ", ".join(_told(value) for value in (e.adapter.rank, e.adapter.alpha, e.adapter.dropout))
        yield "targets", ", ".join(sizes.target_names.get(target, target) for target in e.adapter.targets or ())
    if e.preference is not None:
        yield "preferences", f"DPO, loss {e.preference.loss}, beta {e.preference.beta:g}"
    if e.model.experts_per_token is not None:
        yield "experts per token", str(e.model.experts_per_token)
    yield "optimizer", f"{t.optimizer}, learning rate {t.learning_rate:g}, {t.schedule}, {t.warmup_steps} warm-up steps"
    yield "a step", f"{t.gradient_accumulation * d.batch_rows} rows ({d.batching}), queries of at most {d.max_length} tokens"
    if d.template is not None:
        yield "template", d.template
    yield "computed in", t.compute_dtype
    yield "seed", str(e.seed)


def _told(value: Any) -> str:
    return ", ".join(f"{key} {one:g}" for key, one in value.items()) if isinstance(value, dict) else f"{value:g}"


def _scores(experiment: Experiment, folder: Path) -> Iterator[Row]:
    """What was measured of the model that is exported: as it trained, by `moejax eval` and `moejax exact-match`, and of a best/ folder."""
    records = _records(folder)
    for key, what in (("loss", "loss on held-out data"), ("rewards/accuracies", "held-out pairs whose chosen side has the larger reward")):
        found = [r for r in records if f"eval_{key}" in r]
        if found:
            value = found[-1][f"eval_{key}"]
            yield f"{what}, after step {found[-1]['step']}", f"{value:.4f}" if key == "loss" else _percent(value)
    best, task = _json(folder / "evaluation.json"), None if experiment.eval is None else experiment.eval.task
    counted = [r for r in records if "eval/accuracy" in r] or ([best] if "eval/accuracy" in best else [])
    if counted and task is not None:
        last = counted[-1]
        low, high = (100 * last[f"eval/accuracy_{end}"] for end in ("low", "high"))
        interval = f"95 % interval {low:.1f} to {high:.1f} %"
        yield f"{task}, {last['eval/problems']:.0f} problems, after step {last['step']}", f"{_percent(last['eval/accuracy'])} ({interval})"
        if counted[0]["step"] == 0 and len(counted) > 1:
            yield f"{task}, the untrained model", _percent(counted[0]["eval/accuracy"])
    for path in sorted(folder.glob("eval/*/result.json")):
        result, name = _json(path), path.parent.name
        if not name.startswith("step-") and {"task", "n", "accuracy"} <= result.keys():
            of = ", the base" if name.endswith("-base") else ""
            yield f"{result['task']}, {result['n']} problems{of}", _percent(result["accuracy"])
    for path in sorted(folder.glob("exact_match*.json")):
        result = _json(path)
        for name, value in (result.get("accuracy") or {}).items():
            of = {"base": "the base", "tuned": "this model"}.get(name, name)
            yield f"exact match, {result['problems']} problems of `{place_name(result['data'])}`, {of}", _percent(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return json_lines.read(path)[0] if path.is_file() else []


def _json(path: Path) -> dict[str, Any]:
    """Nothing where there is none, or it is damaged: the card says less then."""
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}
