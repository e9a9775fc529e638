"""A conversation with a model, message by message, over one cache: what the cache holds of it is not computed again."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.data.conversation import Message, to_answer
from moejax.data.ends import Ends
from moejax.data.records import unicode
from moejax.data.supervision import prompt_of_talk
from moejax.errors import UserError
from moejax.evaluation.generate import Answers, End, Sampling, bucket, decoded, draw_of, names_of, padded, read
from moejax.models.build import Model
from moejax.models.cache import Cache, can_forget, init_cache
from moejax.progress import note

AT_ONCE = (32, 128, 512)  # lengths that what is read is padded to; longer prompts are read 512 tokens at a time


class Held:
    """One sequence in a cache: a prompt that begins like it is read from where it differs.

    The cache has 16, 32, 64, … places and is made again, twice as large, when prompt and answer exceed it. So few programs are compiled:
    one to decode for each size of the cache, and one to read for each length of what is new.
    """

    def __init__(self, model: Model):
        self.model, self.split = model, nnx.split(model)
        self.ids: list[int] = []  # the tokens that the cache holds
        self.places = 0
        self._cache: Cache | None = None

    def answer(
        self, prompt: Sequence[int], max_new_tokens: int, end: End, sampling: Sampling, piece: int = 8
    ) -> Iterator[np.ndarray]:
        """The tokens of the answer as they are decoded: int32 [1], then [up to `piece`]; as `generate.stream` gives them. It may be left
        at any piece: the next prompt finds what was decoded until then."""
        known = self._known(prompt)
        if not known or len(prompt) + max_new_tokens > self.places:
            known, self._cache = 0, None  # the old one goes first: both may be too much
            self.places = min(bucket(len(prompt) + max_new_tokens), self.model.config.max_position_embeddings)
            self._cache = init_cache(self.model, 1, self.places)
        assert self._cache is not None
        cache, self._cache = self._cache._replace(lengths=jnp.full(1, known, jnp.int32)), None  # it is given away
        self.ids, shown = [], 0
        draw = draw_of(self.model, sampling, names_of([prompt]))
        while len(prompt) - known > AT_ONCE[-1]:
            tokens = padded([prompt[known : known + AT_ONCE[-1]]], AT_ONCE[-1])
            cache, known = read(self.split, *tokens, cache, draw, max_new_tokens, end), known + AT_ONCE[-1]
        tokens = padded([prompt[known:]], next(length for length in AT_ONCE if length >= len(prompt) - known))
        for out, after in decoded(self.split, *tokens, cache, draw, max_new_tokens, end, piece):
            answer = out[0].tolist()
            self._cache, self.ids = after, [*prompt, *answer][: int(after.lengths[0])]
            yield out[0, shown:]
            shown = len(answer)

    def _known(self, prompt: Sequence[int]) -> int:
        """How many tokens of the prompt the cache holds, at most all but the last, whose logits are needed."""
        equal = next((n for n, (a, b) in enumerate(zip(self.ids, prompt, strict=False)) if a != b), min(len(self.ids), len(prompt)))
        known = min(equal, len(prompt) - 1)
        return known if known == len(self.ids) or can_forget(self.model) else 0


class Dialogue:
    """Messages and answers, rendered as in training, and how the next answer is made.

    template: data.template. system: what the system says, or "". max_new_tokens: None for 512, at most half the model's positions. Where
    the template has no second turn, each message stands alone. When messages and answers exceed the model's positions, the oldest go,
    until half of the positions are free; that is noted once.

    Raises UserError where the template has no questions (`text`), or refuses the system's text.
    """

    def __init__(
        self, model: Model, tokenizer: Any, template: str, ends: Ends, sampling: Sampling, *, system: str = "",
        max_new_tokens: int | None = None,
    ):  # fmt: skip
        positions = model.config.max_position_embeddings
        self.several = has_turns(tokenizer, template, system)
        self.max_new_tokens = min(512, positions // 2) if max_new_tokens is None else max_new_tokens
        self.room = positions - self.max_new_tokens  # for what is asked
        if self.room < 1:
            raise UserError(f"answers of {max_new_tokens} tokens leave no room for a question in the model's {positions} positions")
        self.turns: list[Message] = []
        self.tokens = 0  # of all answers
        self.cut = False  # whether the last answer ended at max_new_tokens
        self._asking = (tokenizer, template, system)
        self._ends, self._sampling = ends, sampling
        self._held, self._noted = Held(model), False

    def reset(self) -> None:
        """Forget all messages and answers; what the system says stays."""
        self.turns = []

    def ask(self, message: str) -> Generator[str, None, None]:
        """The answer in pieces of whole characters. Left before its end, its beginning is what was answered; without a character of it,
        the message is forgotten too. Raises UserError for a message that is too long, or no Unicode, or refused by the template."""
        prompt = self._prompt(unicode("the message", message))
        answers, said = Answers(self._asking[0], (), 1, self._ends), ""
        try:
            for piece in self._held.answer(prompt, self.max_new_tokens, self._ends.ids, self._sampling):
                before = answers.count()
                answers.add(piece[None])
                self.tokens += answers.count() - before
                text = answers.certain(len(said))
                said += text
                yield text
                if answers.finished():
                    break
            self.cut = not answers.finished()
            rest = answers.text(0)[0][len(said) :]
            said += rest
            yield rest
        finally:
            if said and self.several:
                self.turns += [{"role": "user", "content": message}, {"role": "assistant", "content": said}]

    def _prompt(self, message: str) -> list[int]:
        """The tokens of the conversation up to the next answer, its oldest turns left out where they do not fit."""
        ids = rendered(*self._asking, self.turns, message)
        if len(ids) <= self.room:
            return ids
        turns = self.turns
        while turns and len(ids) > self.room // 2:  # not to the brim: else everything had to be read again for each message from here on
            turns = turns[2:]
            ids = rendered(*self._asking, turns, message)
        if len(ids) > self.room:
            raise UserError(
                f"the message has {len(ids)} tokens with its template, and next to an answer of {self.max_new_tokens} there is room for "
                f"{self.room}: shorten it, or ask for fewer new tokens"
            )
        self.turns = turns
        if not self._noted:
            note(f"the context is full ({self.room + self.max_new_tokens} tokens): from here on the oldest turns are forgotten")
            self._noted = True
        return ids


def has_turns(tokenizer: Any, template: str, system: str = "") -> bool:
    """Whether the template renders a question that follows an answer. Raises UserError where it does not render a first one."""
    rendered(tokenizer, template, system, [], "a question")
    answered = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    try:
        rendered(tokenizer, template, system, answered, "a question")
    except UserError:
        return False
    return True


def rendered(tokenizer: Any, template: str, system: str, turns: Sequence[Message], message: str) -> list[int]:
    """The tokens of a conversation up to the next answer, as `moejax generate --messages` has them."""
    said = [{"role": "system", "content": system}] if system else []
    talk = to_answer({"messages": [*said, *turns, {"role": "user", "content": message}]}, "the conversation")
    return prompt_of_talk(talk, tokenizer, template, "the conversation")[1]
