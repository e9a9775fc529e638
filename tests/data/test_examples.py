"""Queries as they are shown before training: which tokens are trained on, and nothing that moves a terminal's cursor."""

import io

import numpy as np
from support import ROOT

from moejax.commands.shown import Shown
from moejax.data.examples import LONGEST_SHOWN, examples, shown
from moejax.data.tokenize import Query
from moejax.data.tokenizer import byte_tokenizer, load_tokenizer
from moejax.progress import Marked
from moejax.terminal import Console

TOKENIZER = load_tokenizer(str(ROOT / "assets/tiny-mixtral/tokenizer.json"))


def encoded(*texts):
    return [TOKENIZER.encode(text, add_special_tokens=False) for text in texts]


def test_by_the_mask_of_the_loss():
    prompt, answer = encoded("[INST] a [/b] [red] [/INST]", "Tom\nhas 5.")
    query = Query.after(len(prompt), np.array([*prompt, *answer, TOKENIZER.eos_token_id], np.int32))
    assert shown(query, TOKENIZER) == [("[INST] a [/b] [red] [/INST]", False), ("Tom\u21b5\nhas 5.</s>", True)]
    turns = Query(query.ids, np.arange(len(query.ids)) % 4 < 2)
    parts = shown(turns, TOKENIZER)
    assert "".join(part for part, _ in parts) == "[INST] a [/b] [red] [/INST]Tom\u21b5\nhas 5.</s>"
    assert not parts[0][1], "the first token is never predicted"
    assert [marked for _, marked in parts] == [n % 2 == 1 for n in range(len(parts))]
    long = Query.after(7, np.tile(query.ids, 100))
    assert max(len(part) for part, _ in shown(long, TOKENIZER)) < LONGEST_SHOWN + 100


def test_control_characters_are_written_out(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.encode("a\x1b[31m\u202eb\tc", add_special_tokens=False)
    assert shown(Query.after(0, np.array([1, *ids], np.int32)), tokenizer)[1][0] == "a\\u001b[31m\\u202eb\tc"


def test_three_of_many_and_all_of_few():
    queries = [Query.after(1, np.full(3 + n, 5, np.int32)) for n in range(9)]
    assert [told.title for told in examples(queries, TOKENIZER)] == [f"query {n} of 9, {n + 2} tokens" for n in (1, 5, 9)]
    assert len(examples(queries[:1], TOKENIZER)) == 1 and len(examples(queries[:2], TOKENIZER)) == 2


def said(told, **settings):
    listener, out = Shown(), io.StringIO()
    listener.__dict__["out"] = Console(file=out, width=40, **settings)
    listener.say(told)
    return out.getvalue()


def test_brackets_in_a_file_and_colour_on_a_terminal():
    told = Marked("one", [("[b]ask\u21b5\n", False), ("answer that is longer than the terminal's width", True)])
    plain = said(told)
    assert plain == (
        "one (\u27e6 … \u27e7: trained on)\n  [b]ask\u21b5\n  \u27e6answer that is longer than the terminal's width\u27e7\n"
    )
    coloured = said(told, force_terminal=True, color_system="standard")
    assert "\u27e6" not in coloured and "\x1b[1;32manswer that" in coloured and "green: trained on" in coloured
