"""Conversations over one cache, and `moejax chat`."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from support import ROOT, finished_run

from moejax import api, cli, progress
from moejax.data.ends import Ends
from moejax.errors import UserError
from moejax.evaluation import dialogue, generate
from moejax.evaluation.dialogue import Dialogue, Held, has_turns
from moejax.models.build import build
from moejax.models.config import PRESETS

FIRST, SECOND = "Tom has 4 apples and buys 5. How many has he?", "And Ana?"
GREEDY = generate.Sampling()
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2}


@pytest.fixture(scope="module")
def lm(run):
    return api.load(run)


@pytest.fixture(scope="module")
def expected(lm):
    """The answers of lm.chat to two messages, the second after the first."""
    talk = [{"role": "user", "content": FIRST}]
    first = lm.chat(talk, max_new_tokens=12)
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": SECOND}]
    return first, lm.chat(talk, max_new_tokens=12)


def chat(monkeypatch, capsys, run, text, *options):
    """(exit code, standard output, standard error) of the command with this text in a pipe."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()), "utf-8"))
    code = cli.main(["chat", str(run), *options])
    return code, *capsys.readouterr()


def test_a_line_is_a_message_with_what_came_before(run, expected, monkeypatch, capsys):
    text = f"{FIRST}\n\n{SECOND}\n/reset\n{FIRST}\n/exit\n{SECOND}\n"
    code, out, err = chat(monkeypatch, capsys, run, text, "--max-new-tokens", "12")
    assert code == 0 and out == "".join(f"{answer}\n" for answer in (*expected, expected[0]))
    assert err.splitlines()[-1].endswith("tokens/s (decoding, without prefill and compile)")
    assert err.count("(cut at 12 tokens: --max-new-tokens)") == len(err.splitlines()) - 1


@pytest.mark.long  # its programs are compiled for nothing else
def test_drawn_answers_are_those_of_the_api(lm, run, monkeypatch, capsys):
    settings = {"max_new_tokens": 9, "temperature": 1.5, "top_p": 0.99, "top_k": 50, "seed": 2}
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": FIRST}]
    assert chat(monkeypatch, capsys, run, FIRST, "--system", "Be brief.", *options)[1] == lm.chat(talk, **settings) + "\n"


class Watched(io.StringIO):
    """Standard output that presses Ctrl-C when something is written for the first time."""

    def write(self, text):
        if text and not self.getvalue():
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_an_answer_is_stopped_and_the_program_goes_on(run, expected, lm, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", Watched())
    handler = signal.getsignal(signal.SIGINT)  # ignored where the suite runs in a shell's background
    code, _, err = chat(monkeypatch, capsys, run, f"{FIRST}\n{SECOND}\n", "--max-new-tokens", "12")
    said, after = sys.stdout.getvalue().splitlines()
    assert code == 0 and err.splitlines()[0] == "(stopped)"
    assert said and len(said) < len(expected[0]) and expected[0].startswith(said)
    said_until = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": said}, {"role": "user", "content": SECOND}]
    assert after == lm.chat(said_until, max_new_tokens=12)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.long
def test_in_a_terminal(run):
    """Ctrl-C as a terminal sends it: at the prompt, and during an answer; Ctrl-D ends."""
    # SIGINT is ignored where the suite runs in a shell's background, and by all that it starts.
    spawn = "import pty, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    command = [sys.executable, "-c", spawn, sys.executable, "-m", "moejax", "chat", str(run), "--max-new-tokens", "1500"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}, bufsize=0
    ) as process:
        seen = b""

        def until(*texts):
            """Read up to these, one after the other."""
            nonlocal seen
            for text in texts:
                while text not in seen:
                    piece = os.read(process.stdout.fileno(), 1000)
                    assert piece, seen
                    seen += piece
                seen = seen.partition(text)[2]

        until(b"/reset forgets", b"> ")
        process.stdin.write(b"\x03")
        until(b"(/exit or Ctrl-D ends)", b"> ")
        process.stdin.write(f"{FIRST}\n".encode())
        until(FIRST.encode(), b"\n")  # what is typed is shown
        while len(seen.strip()) < 4:
            seen += os.read(process.stdout.fileno(), 1000)
        process.stdin.write(b"\x03")
        until(b"(stopped)", b"> ")
        process.stdin.write(b"\x04")
        assert process.wait(60) == 0, seen


@pytest.mark.parametrize("family", ["mixtral-tiny", pytest.param("blackmamba-tiny", marks=pytest.mark.long)])
def test_only_what_is_new_is_read(family, monkeypatch):
    """Answers are those without a cache; a Mamba's state cannot forget, keys and values can."""
    model, read = build(PRESETS[family].replace(**SIZES), key=jax.random.key(0), dtype=jnp.float32), []
    decoded = generate.decoded
    monkeypatch.setattr(dialogue, "decoded", lambda *a: read.append(int(a[2][0])) or decoded(*a))
    held, prompt, answers = Held(model), list(range(3, 38)), []
    for following in ([], [7, 8, 9], [4] * 5):
        prompt = [*prompt, *(answers[-1] if answers else []), *following]
        pieces = list(held.answer(prompt, 6, -1, GREEDY, piece=4))
        assert [len(piece) for piece in pieces] == [1, 4, 1]
        answers.append([int(token) for piece in pieces for token in piece])
        assert answers[-1:] == generate.generate(model, [prompt], max_new_tokens=6, end=-1)
    assert read == [35, 1 + 3, 1 + 5]  # the last token of an answer was never read
    forgotten = [*prompt[:40], 11]
    (piece, *_) = held.answer(forgotten, 6, -1, GREEDY)
    assert piece[0] == generate.generate(model, [forgotten], max_new_tokens=6, end=-1)[0][0]
    assert read[3:] == ([1] if family == "mixtral-tiny" else [41])
    monkeypatch.setattr(dialogue, "AT_ONCE", (8, 32))  # 32 tokens at a time
    pieces = Held(model).answer(prompt, 6, -1, GREEDY)
    assert [int(token) for piece in pieces for token in piece] == answers[-1] and read[4:] == [len(prompt) - 32]


def test_nothing_is_compiled_for_a_second_message():
    """One program to decode for each size of the cache, one to read for each length of what is new."""
    model = build(PRESETS["mixtral-tiny"].replace(**SIZES), key=jax.random.key(0), dtype=jnp.float32)
    held, prompt, counted = Held(model), [], []
    for length in (12, 9, 1, 3):
        prompt += [3] * length
        assert sum(len(piece) for piece in held.answer(prompt, 6, -1, GREEDY)) == 6 and held.places == 32
        counted.append([program.jitted()._cache_size() for program in (generate._begin, generate._go_on)])
    assert counted == [counted[0]] * 4


def test_the_oldest_turns_go_when_the_context_is_full(lm, monkeypatch):
    """Until half of it is free; said once. A message for which there is no room is refused, and changes nothing."""
    told = []
    monkeypatch.setattr(progress._heard_by[0], "note", told.append)
    talk, lengths = Dialogue(lm.model, lm.tokenizer, lm.template, lm.ends, GREEDY, system="Be brief.", max_new_tokens=12), []
    talk.room = 128 - 12  # as if the model had so few positions
    for number in range(6):
        "".join(talk.ask(f"{number}: {FIRST}"))
        lengths.append(len(talk.turns))
        assert len(talk._held.ids) <= 128 and talk.turns[-2]["content"].startswith(f"{number}: ")
    assert lengths[:2] == [2, 4] and max(lengths) < 14 and sum(b < a for a, b in itertools.pairwise(lengths)) >= 1
    assert told == ["the context is full (128 tokens): from here on the oldest turns are forgotten"]
    before = list(talk.turns)
    with pytest.raises(UserError, match=r"the message has \d+ tokens with its template, .* there is room for 116: shorten it"):
        next(talk.ask("apples " * 200))
    assert talk.turns == before
    with pytest.raises(UserError, match="answers of 2048 tokens leave no room for a question in the model's 2048 positions"):
        Dialogue(lm.model, lm.tokenizer, lm.template, lm.ends, GREEDY, max_new_tokens=2048)


def test_a_template_without_a_second_turn(lm, run):
    tokenizer = api.load(run).tokenizer
    tokenizer.chat_template = (
        "{% if messages|length > 2 or messages[0]['role'] != 'user' %}{{ raise_exception('one only') }}{% endif %}"
        "[INST] {{ messages[0]['content'] }} [/INST]{{ messages[1]['content'] if messages|length > 1 }}"
    )
    talk = Dialogue(lm.model, tokenizer, "chat", Ends(lm.ends.ids), GREEDY, max_new_tokens=12)
    answers = ["".join(talk.ask(FIRST)) for _ in range(2)]
    assert answers[0] == answers[1] and talk.turns == [] and not talk.several
    with pytest.raises(UserError, match="one only"):
        has_turns(tokenizer, "chat", "Be brief.")


def test_bad_input(run, tmp_path, monkeypatch, capsys):
    base, text = tmp_path / "base", tmp_path / "text"
    shutil.copytree(ROOT / "assets/tiny-mixtral", base)
    finished_run(text, data={"source": str(ROOT / "assets/problems/train.json"), "template": "text"})
    monkeypatch.setattr("moejax.runs.open.create_model", lambda *_: pytest.fail("weights were read"))
    for folder, options, told in (
        (tmp_path / "nowhere", [], "is not a finished run"),
        (base, [], "whose tokenizer has no chat template: how it is asked stands nowhere"),
        (base, ["--base"], "there is no adapter to leave out"),
        (text, [], f"has no messages: moejax generate {text} --prompt TEXT"),
        (run, ["--max-new-tokens", "0"], "--max-new-tokens 0: expected 1 or more"),
        (run, ["--temperature", "-1"], "temperature = -1.0"),
        (run, ["--system", "\udcff"], "--system holds a byte that is not UTF-8"),
    ):
        code, out, err = chat(monkeypatch, capsys, folder, "a\n", *options)
        assert code == 2 and out == "" and told in err and "Traceback" not in err, told
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages[0].nothing.at_all }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    code, out, err = chat(monkeypatch, capsys, base, "a\n")
    assert code == 2 and "could not be rendered" in err and "Traceback" not in err


def test_a_message_that_is_no_text(run, expected, monkeypatch, capsys):
    """In a pipe it ends: what follows would answer to something else."""
    code, out, err = chat(monkeypatch, capsys, run, FIRST.encode() + b"\n\xff\n" + SECOND.encode(), "--max-new-tokens", "12")
    assert code == 2 and out == expected[0] + "\n" and "error: the message holds a byte that is not UTF-8" in err
