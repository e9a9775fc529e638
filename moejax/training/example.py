"""One record as the model gets it: which of its tokens are trained on, readable without colour."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from moejax.data.batching import assemble
from moejax.data.tokenize import Query

LONGEST = 600  # characters of a part that are shown


def lines(query: Query, tokenizer: Any) -> list[str]:
    """The parts of a query in order, as text: read (the prompt), or trained on. By the very mask that the loss takes."""
    batch = assemble([[query]], 1, len(query.ids))
    trained = [False, *(bool(m) for m in batch.loss_mask[0][:-1])]  # a position's mask is that of the token after it
    told = [f"the first record, {len(query.ids)} tokens:"]
    for is_trained, group in groupby(range(len(trained)), key=trained.__getitem__):
        ids = [int(query.ids[i]) for i in group]
        text = json.dumps(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), ensure_ascii=False)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
        told.append(f"  {'trained on' if is_trained else 'only read '} ({len(ids)}): {text}")
    return told
