"""Tokens that a run adds to its tokenizer, and the rows of embedding and head that they have."""

from __future__ import annotations

from moejax.config import AUTO_TOKENS, Experiment
from moejax.data.tokenizer import CHATML_TOKENS, check_ids, lacking, load_tokenizer
from moejax.errors import UserError


def settled(experiment: Experiment, source: str | None, vocab_size: int) -> Experiment:
    """The experiment with its added tokens by name, the size of the vocabulary with them and, next to an adapter, their ids.

    source: of the tokenizer; None where it is not here: then as many rows are counted, at the end of what the embedding has.
    vocab_size: rows of the model's own embedding; those beyond the tokenizer's ids are used first. Raises UserError for a tokenizer
    that does not belong to the model, and for other rows in adapter.token_rows.
    """
    added = experiment.added_tokens
    if not added:
        return experiment
    if source is None:
        count = len(CHATML_TOKENS if added == AUTO_TOKENS else added)
        ids, vocabulary = tuple(range(vocab_size - count, vocab_size)), vocab_size
    else:
        added = tuple(lacking(load_tokenizer(source))) if added == AUTO_TOKENS else added
        known = load_tokenizer(source, added).get_vocab()
        check_ids((id_ for token, id_ in known.items() if token not in added), vocab_size)
        ids, vocabulary = tuple(sorted({known[token] for token in added})), max(vocab_size, 1 + max(known.values()))
    changed = experiment.model_copy(update={"added_tokens": added}).changed("model", vocabulary=vocabulary)
    if experiment.adapter is None:
        return changed
    given = experiment.adapter.token_rows
    if given is not None and given != ids and source is not None:
        raise UserError(f"adapter.token_rows = {list(given)}: those of added_tokens are {list(ids)}: leave one of the two out")
    return changed.changed("adapter", token_rows=ids)
