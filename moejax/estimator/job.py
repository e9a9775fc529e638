"""What is to be trained, and what of its queries a step really computes: each cut is reported, with the option that changes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moejax.errors import UserError
from moejax.estimator import roofline
from moejax.estimator.lengths import STUDY_MULTIPLE, Batching, Lengths
from moejax.estimator.roofline import Method
from moejax.models.config import PRESETS, Architecture

if TYPE_CHECKING:
    from moejax.config import Experiment


@dataclass(frozen=True)
class Job:
    """`model`: "mixtral" or "blackmamba"; `queries` of `lengths`, `epochs` times. `row_tokens`: where a longer query is cut, and the
    length of a row of "fixed" and "pack"; `multiple`: what a padded row is rounded up to. `devices`: cards, on which weights lie as
    `mesh.weights` says."""

    model: str
    method: Method
    experts_per_token: int
    lengths: Lengths
    queries: int
    epochs: float
    batching: Batching = "pad_longest"
    row_tokens: int | None = None
    multiple: int = STUDY_MULTIPLE
    devices: int = 1
    weights: Literal["whole", "spread", "experts"] = "whole"

    def __post_init__(self) -> None:
        experts = self.config.num_experts
        if not 1 <= self.experts_per_token <= experts:
            raise UserError(f"experts per token = {self.experts_per_token}: expected 1 to {experts} (all of them: the dense model)")
        for name, value in (("records", self.queries), ("epochs", self.epochs)):
            if not 0 < value < math.inf:
                raise UserError(f"{name} = {value:g}: expected more than 0")
        if self.weights == "experts" and experts % self.devices:
            raise UserError(f"--weights experts: {experts} experts do not divide among {self.devices} devices")
        if self.weights == "spread" and self.method == "full":
            raise UserError("--weights spread is of frozen weights, and --method full trains all: expected whole or experts")
        positions = self.config.max_position_embeddings
        if self.row_tokens is not None and self.row_tokens > positions:
            raise UserError(f"rows of {self.row_tokens} tokens exceed {self.preset}'s max_position_embeddings = {positions}")
        self.tokens(1)  # a batching that cannot be meant is reported at once

    @property
    def preset(self) -> str:
        return roofline.STUDY_MODELS[self.model][0]

    @property
    def config(self) -> Architecture:
        return PRESETS[self.preset]

    @property
    def largest_batch(self) -> int:
        """Queries that there are for one batch."""
        return min(self.queries, self.lengths.queries) if self.batching.startswith("pad") else self.queries

    @property
    def share(self) -> float:
        return self.experts_per_token / self.config.num_experts

    @property
    def work(self) -> roofline.Work:
        return roofline.work(self.config, self.method)

    @property
    def experiment(self) -> Experiment:
        """As a config of this project says it, full fine-tuning as the study's: weights and moments in bf16."""
        from moejax.config import Experiment  # pydantic: a quarter of a second

        several = {"devices": self.devices, "weights": self.weights}
        return Experiment.model_validate(
            {
                "name": self.model, "model": {"preset": self.preset, "experts_per_token": self.experts_per_token},
                "data": {"batching": "fixed", "row_tokens": self.longest, "batch_rows": self.devices},
                "quantization": {"format": "nf4" if self.method == "qlora" else "none"}, "adapter": None if self.method == "full" else {},
                "training": {"steps": 1, "param_dtype": "bfloat16", "remat": "full"}, "mesh": several if self.devices > 1 else None,
            }
        )  # fmt: skip

    @property
    def cut(self) -> int:
        """Tokens at which a longer query is cut: by the job's rows, the study's own sets, or the model's positions."""
        return min(self.lengths.cut(self.row_tokens), self.config.max_position_embeddings)

    def tokens(self, batch: int) -> float:
        """Tokens that a step of this many queries computes."""
        row = self.row_tokens if self.batching == "fixed" else self.cut
        return self.lengths.batch_tokens(batch, self.batching, row_tokens=row, multiple=self.multiple)

    @property
    def longest(self) -> int:
        """Tokens of the longest row that must fit in memory."""
        if self.batching in ("fixed", "pack") and self.row_tokens is not None:
            return self.row_tokens
        longest = min(self.lengths.longest, self.cut)
        return int(self.lengths.padded([longest], self.multiple, self.batching == "pad_bucket")[0])

    @property
    def told(self) -> tuple[str, ...]:
        """How long the rows are, and which queries are not computed as long as they are."""
        rows = {
            "pad_longest": f"a batch is as long as its longest query, in steps of {self.multiple} tokens (--pad-multiple)",
            "pad_bucket": "a batch is as long as the smallest of 128, 256, 512 … tokens that holds its longest query",
            "pack": "packed rows are taken as full (--batching)",
            "fixed": f"every query takes a row of {self.row_tokens} tokens (--seq-len)",
        }[self.batching]
        over = self.lengths.longer_than(self.cut)
        if not over:
            return (rows,)
        why = f": {self.preset} has no more positions"
        if self.cut < self.config.max_position_embeddings:
            why = " (--seq-len)" if self.row_tokens else ", as the study cut its own sets (--seq-len cuts elsewhere)"
        many = f"{over:,} of {self.lengths.queries:,} queries {'are' if over > 1 else 'is'}"
        return rows, f"{many} longer than {self.cut:,} tokens and cut there{why}"
