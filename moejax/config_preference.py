"""The section `preference`: training on pairs of answers (DPO)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moejax.config_values import Real, Section


class PreferenceConfig(Section):
    """Preference training (DPO, arXiv 2305.18290): of two answers to a prompt one is chosen, the other rejected. With ratios, the log of
    what model and frozen base give an answer: loss of beta · (ratio of chosen - ratio of rejected), a mean over the pairs of a step."""

    loss: Literal["sigmoid", "robust", "ipo"] = Field(
        "sigmoid", description="sigmoid: DPO; robust: of labels that are wrong with the probability label_smoothing (arXiv 2403.00409); "
        "ipo: of ratios per token of an answer, squared distance from 1/(2 beta) (arXiv 2310.12036)"
    )  # fmt: skip
    beta: Annotated[Real, Field(gt=0)] = 0.1
    label_smoothing: Annotated[Real, Field(ge=0, lt=0.5)] = Field(
        0.0, description="with sigmoid: cDPO, the loss of a pair whose sides are swapped with this probability"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing = {self.label_smoothing} is of the losses sigmoid and robust: ipo has none: remove it")
        return self

    def check(self, experiment: Any) -> None:
        """Raises ValueError for other sections of an Experiment with which there is no preference training."""
        d = experiment.data
        if experiment.adapter is None:
            raise ValueError(
                "preference needs an adapter: the reference is the frozen base without it, and a model that is trained whole would need "
                "a second copy of itself in memory. Add adapter: {}"
            )
        if d.source is None:
            raise ValueError("preference needs pairs of answers: give data.source")
        if d.template == "text":
            raise ValueError("preference trains on answers, and data.template = text knows none: use chat, chatml, mistral or alpaca")
        for source in d.sources:
            unused = [name for name in ("output", "text") if getattr(source.fields, name) is not None]
            if unused:
                raise ValueError(f"data.fields.{unused[0]}: preference reads the answers of a pair, from fields.chosen and fields.rejected")
        if experiment.training.label_smoothing:
            raise ValueError("training.label_smoothing is of cross-entropy, which preference does not train on: preference.label_smoothing")
        if d.batching == "pack" and 2 * d.max_length > d.row_tokens:
            raise ValueError(
                f"data.row_tokens = {d.row_tokens}: both sides of a pair lie in one row, expected at least twice data.max_length = "
                f"{d.max_length} (or data.batching = pad_longest with an even data.batch_rows: a side a row)"
            )
        if d.batching != "pack" and d.batch_rows % 2:
            raise ValueError(
                f"data.batch_rows = {d.batch_rows}: the sides of a pair are two rows of a micro-batch with data.batching = {d.batching}: "
                "expected an even number"
            )
