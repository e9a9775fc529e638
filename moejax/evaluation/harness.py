"""lm-evaluation-harness on our models (extra `eval`): its model interface, so that its tasks run on a run's folder or a model's.

    from moejax.evaluation.harness import MoejaxLM
    lm_eval.simple_evaluate(MoejaxLM("runs/demo"), tasks=["hellaswag"])

Several processes run the same script: all answer every request together, and the first has the results (the others' are None).

Texts become tokens as in training: nothing is put before them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    from moejax import installation

    raise ModuleNotFoundError(f"lm-evaluation-harness is not installed: {installation.for_extra('eval')}", name=error.name) from error
import jax
from tqdm import tqdm

from moejax import processes
from moejax.data import chat
from moejax.data.ends import ends_of
from moejax.errors import UserError
from moejax.evaluation.generate import Sampling, generate, in_groups, said
from moejax.evaluation.loglikelihood import encoded, loglikelihoods
from moejax.models.build import Model
from moejax.runs.devices import joined
from moejax.runs.open import load

MAX_NEW_TOKENS = 256  # the harness's own default, where a task names no length
ENDLESS = 2**31 - 1  # the positions of a model that knows none
KNOWN = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "do_sample", "temperature", "top_p", "top_k", "seed")


class MoejaxLM(TemplateLM):
    """A finished run (its adapter applied; on all devices, where it was trained on a mesh) or a model's folder.
    batch_size: requests computed together. base: without the adapter. mesh: keys of the config's section, e.g. {"devices": 2}, in the
    place of the run's.

    Give `model` and `tokenizer` instead of a folder for a model that is loaded already. Raises UserError as `moejax eval` does.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        batch_size: int | str = 16,
        base: bool = False,
        model: Model | None = None,
        tokenizer: Any = None,
        mesh: Mapping[str, Any] | None = None,
        **_: Any,  # the harness also hands over device and max_batch_size
    ) -> None:
        super().__init__()
        if (run is None) == (model is None):
            raise UserError("MoejaxLM: give a folder (run=…), or a model and its tokenizer")
        if run is not None:
            loaded = load(Path(run), base, joined(Path(run), mesh))
            if processes.count() > 1:  # by which the harness knows, of several processes with all requests, the one that writes
                os.environ["LOCAL_RANK"] = str(jax.process_index())
            model, tokenizer, ends = loaded.make(), loaded.tokenizer, loaded.ends
        else:
            ends = ends_of(tokenizer, "mistral")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size = {batch_size}: expected a number from 1 on (it is not searched for here)")
        assert model is not None
        self.model, self.tokenizer, self.ends, self.rows = model, tokenizer, ends, int(batch_size)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most: a Mixtral's positions; 2048 for a BlackMamba, which was trained on such rows."""
        positions = self.model.config.max_position_embeddings
        return positions if positions < ENDLESS else 2048

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """With the tokenizer's own chat template. Raises UserError where it has none, or one that refuses."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError("this tokenizer has no chat template: leave out apply_chat_template")
        return chat.applied(self.tokenizer, chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return encoded(self.tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """A context that is too long loses its beginning, as in the harness's own models."""
        pairs = []
        for _texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(f"a continuation of {len(continuation)} tokens exceeds the model's {self.max_length} positions")
            pairs.append((context[-(self.max_length + 1 - len(continuation)) :], continuation))
        processes.same({"requests": pairs})
        with tqdm(total=len(pairs), disable=disable_tqdm or not processes.is_first(), desc="log-likelihoods") as bar:
            scores = loglikelihoods(self.model, pairs, rows=self.rows, progress=lambda done, _: bar.update(done - bar.n))
        answers = [(score.loglikelihood, score.greedy) for score in scores]
        for (texts, _context, _continuation), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts after the end-of-sequence token, each token predicted once; long texts in windows of `max_length`."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, (value, _greedy) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy, or sampled where a task says so (do_sample and temperature); cut before the first of its `until` texts."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [_settings(request.args[1]) for request in requests]
        answers = [""] * len(requests)
        bounds = [self.max_length - new for new, _, _ in settings]
        if any(bound < 1 for bound in bounds):
            raise UserError(
                f"a task asks for {self.max_length - min(bounds)} new tokens: the model has {self.max_length} positions"
            )
        prompts = [(p or [self.prefix_token_id])[-bound:] for p, bound in zip(prompts, bounds, strict=True)]
        keys = [(new, repr(sampling)) for new, sampling, _ in settings]
        processes.same({"requests": [prompts, settings]})
        with tqdm(total=len(requests), disable=disable_tqdm or not processes.is_first(), desc="answers") as bar:
            # All of a group in one call, which makes batches of them: it gives copies of a prompt (a task's repeats) draws of their own.
            for chosen in in_groups(keys, max(1, len(requests))):
                new, sampling, _ = settings[chosen[0]]
                stops = [settings[i][2] for i in chosen]
                outputs = generate(
                    self.model, [prompts[i] for i in chosen], max_new_tokens=new, end=self.ends.ids, batch_size=self.rows,
                    sampling=sampling, stopped=partial(self._stopped, stops) if any(stops) else None,
                )  # fmt: skip
                for index, output in zip(chosen, outputs, strict=True):
                    answers[index] = said(self.tokenizer, output, self.ends, settings[index][2])[0]
                    self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
                bar.update(len(chosen))
        return answers

    def _stopped(self, stops: list[list[str]], number: int, tokens: list[int]) -> bool:
        return said(self.tokenizer, tokens, self.ends, stops[number])[1]


def _settings(asked: dict[str, Any]) -> tuple[int, Sampling, list[str]]:
    """(new tokens, sampling, texts to stop at) of a task's generation_kwargs. Raises UserError for one that is not known here."""
    unknown = [name for name in asked if name not in KNOWN]
    if unknown:
        raise UserError(f"generation_kwargs {', '.join(unknown)}: not known here (there are {', '.join(KNOWN)})")
    until = asked.get("until") or []
    stops = [until] if isinstance(until, str) else [text for text in until if text]
    new = next((asked[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in asked), MAX_NEW_TOKENS)
    temperature = float(asked.get("temperature", 1.0)) if asked.get("do_sample") else 0.0
    sampling = Sampling(temperature, float(asked.get("top_p", 1.0)), asked.get("top_k") or None, int(asked.get("seed", 0)))
    return int(new), sampling, stops
