"""How large a study is: which configs, which batch sizes, how many queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, Literal

from moejax.errors import UserError

Batch = int | str  # queries, or a share of the largest batch: "1/2"; "largest"


@dataclass(frozen=True)
class Sizes:
    """What a sweep runs of each config. Lengths in tokens, padded up to whole rows (config_data.ROW_MULTIPLE); a batch is a number of
    queries, or a share of the largest ("1/4", "largest").

    batches, packed: of throughput, padded to the longest query and packed (there a batch is worth this many of the longest queries).
    queries: trained on in each throughput trial. breakdown_tokens: of a row in the breakdown at batch 1 and at the largest.
    lengths, dense_lengths: of rows at the largest batch, sparse and dense. tune_steps: between the two counts of the experts' load, over
    load_queries. timed, traced: steps of a breakdown. Seconds and counts, nothing of the model.
    """

    routings: tuple[str, ...] = ("sparse", "dense")
    batches: tuple[Batch, ...] = (1, "1/4", "1/2", "largest")
    packed: tuple[Batch, ...] = (1, "1/4", "1/2", "largest")
    pack_row_tokens: int | None = None  # at least as long as the longest query; None: just so
    queries: int = 1000
    breakdown_tokens: int = 128
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    dense_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    tune_steps: int = 300
    load_queries: int = 1000
    timed: int = 10
    traced: int = 3


@dataclass(frozen=True)
class Preset:
    """configs: files of configs/. memory_limit: bytes of a device that has no limit of its own (a CPU). only_sparse: which of the configs
    are not run through all experts too."""

    what: str
    configs: tuple[str, ...]
    sizes: Sizes
    memory_limit: int | None = None
    only_sparse: tuple[str, ...] = ()


STUDY = Sizes()
QUICK = replace(
    STUDY, batches=(1, "largest"), packed=("largest",), queries=100, lengths=(128, 512), dense_lengths=(128,), tune_steps=50,
    load_queries=200, timed=5, traced=2,
)  # fmt: skip
# Few shapes: on a CPU nearly all the time goes into starting and compiling. The problems' queries have 45 to 48 tokens: 2 in a row of 96.
CPU_DEMO = replace(
    QUICK, packed=("1/2",), pack_row_tokens=96, queries=128, breakdown_tokens=64, lengths=(64, 256), dense_lengths=(64,), tune_steps=40,
    load_queries=64, timed=3, traced=1,
)  # fmt: skip
CPU_SMOKE = replace(
    CPU_DEMO, routings=("sparse",), packed=(), queries=32, lengths=(), tune_steps=10, load_queries=16, timed=2,
)  # fmt: skip
PRESETS = {
    "study-mixtral": Preset("Mixtral-8x7B by QLoRA, both data sets", ("mixtral_8x7b_cs_sparse", "mixtral_8x7b_math_sparse"), STUDY),
    "study-blackmamba": Preset(
        "BlackMamba-2.8B, all weights, both data sets", ("blackmamba_2.8b_cs_sparse", "blackmamba_2.8b_math_sparse"), STUDY
    ),
    "quick": Preset("Mixtral-8x7B (or --config) with few points", ("mixtral_8x7b_cs_sparse",), QUICK),
    "cpu-demo": Preset(
        "the bundled Mixtral and BlackMamba, every part, on a CPU", ("demo", "demo_blackmamba"), CPU_DEMO, memory_limit=90_000_000,
        only_sparse=("demo_blackmamba",),
    ),
    "cpu-smoke": Preset(
        "cpu-demo with two throughput trials a model: does it run", ("demo", "demo_blackmamba"), CPU_SMOKE, memory_limit=90_000_000
    ),
}  # fmt: skip


def override(sizes: Sizes, overrides: Sequence[str]) -> tuple[Sizes, list[str]]:
    """(sizes changed by `sweep.NAME=VALUE`, the other overrides). Raises UserError for a size that is none, or a value that fits none."""
    import yaml
    from pydantic import ValidationError

    from moejax.config_data import whole_row  # not above: `moejax --help` need not wait for pydantic
    from moejax.yaml_file import parse_yaml

    rest: list[str] = []
    changes: dict[str, Any] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not name.startswith("sweep."):
            rest.append(text)
            continue
        name = name.removeprefix("sweep.")
        known = Sizes.__dataclass_fields__
        if name not in known or not equals:
            raise UserError(f"override {text!r}: expected sweep.NAME=VALUE with one of {', '.join(known)}")
        try:
            read = parse_yaml(value)
        except (yaml.YAMLError, RecursionError, ValueError):
            read = value  # fits nothing
        wanted = getattr(sizes, name)
        try:
            read = _kind(name, isinstance(wanted, tuple)).validate_python(read)
        except ValidationError:
            raise UserError(f"override {text!r}: expected a value like {list(wanted) if isinstance(wanted, tuple) else wanted}") from None
        read = tuple(dict.fromkeys(read)) if isinstance(read, list) else read  # what is given twice is run once
        if name in ("pack_row_tokens", "breakdown_tokens", "lengths", "dense_lengths") and read is not None:
            read = tuple(dict.fromkeys(map(whole_row, read))) if isinstance(read, tuple) else whole_row(read)
        changes[name] = read
    return replace(sizes, **changes), rest


def _kind(name: str, several: bool) -> Any:
    """What a size must be, as pydantic checks it."""
    from pydantic import Field, TypeAdapter

    count = Annotated[int, Field(strict=True, ge=1)]
    batch = count | Annotated[str, Field(pattern=r"^(largest|1/[1-9][0-9]*)$")]
    kinds: dict[str, Any] = {"routings": Literal["sparse", "dense"], "batches": batch, "packed": batch, "pack_row_tokens": count | None}
    one = kinds.get(name, count)
    least = 0 if name in ("lengths", "dense_lengths") else 1
    return TypeAdapter(Annotated[list[one], Field(strict=True, min_length=least)] if several else one)  # type: ignore[valid-type]


def queries_of(batch: Batch, largest: int) -> int:
    """How many queries a batch is, where `largest` fit. At least 1."""
    return batch if isinstance(batch, int) else largest if batch == "largest" else max(1, int(Fraction(batch) * largest))


def parse_bytes(text: str) -> int:
    """`2GB`, `500MB`, `16GiB` or plain bytes. Raises UserError."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        found = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        found = 0
    if found < 1:
        raise UserError(f"--memory-limit {text}: expected bytes, e.g. 2GB, 500MB or 16GiB")
    return found
