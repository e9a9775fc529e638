"""The bundled task: two-step word problems, and the text that its base model is pre-trained on. All of it made here, from a seed.

    python assets/problems/make.py task assets/problems            # train.json, test.json, pairs.jsonl
    python assets/problems/make.py pretrain assets/generated       # pretrain.jsonl
    python assets/problems/make.py tokenizer assets/tiny-mixtral   # tokenizer.json and its configs

The base model's text is of the same domain and in the same answer format: arithmetic, counting, stories with quantities, one-step
questions, plain and in `[INST]` form. Two-step questions are the task's alone. All numbers lie in 0..99.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

NAMES = {"Mia": "She", "Tom": "He", "Ana": "She", "Ben": "He", "Eva": "She", "Max": "He", "Zoe": "She", "Sam": "He"}
ITEMS = ("apples", "books", "coins", "cards", "shells", "eggs", "pens", "stamps", "cookies", "balls", "stones", "tickets")
LARGEST = 99
PAIRS = 1200  # of the first records of train.json


class Words(NamedTuple):
    """What a sentence talks about: a person with pronoun, another person, an item."""

    name: str
    pronoun: str
    other: str
    item: str


class Template(NamedTuple):
    """A two-step problem over numbers a, b, c. `steps` gives two (left, sign, right); the second's result is the answer."""

    text: str
    steps: Callable[[int, int, int], tuple[tuple[int, str, int], tuple[int, str, int]]]
    product: bool = False


TEMPLATES = (
    Template(
        "{name} has {a} {item}. {pronoun} buys {b} more and gives {c} to {other}. How many {item} does {name} have now?",
        lambda a, b, c: ((a, "+", b), (a + b, "-", c)),
    ),
    Template(
        "{name} has {a} {item}. {pronoun} loses {b} of them and finds {c} new ones. How many {item} does {name} have now?",
        lambda a, b, c: ((a, "-", b), (a - b, "+", c)),
    ),
    Template(
        "There are {a} {item} on the table. {name} takes {b} and {other} takes {c}. How many {item} are left?",
        lambda a, b, c: ((a, "-", b), (a - b, "-", c)),
    ),
    Template(
        "{name} picks {a} {item} on Monday, {b} on Tuesday and {c} on Friday. How many {item} does {name} pick in all?",
        lambda a, b, c: ((a, "+", b), (a + b, "+", c)),
    ),
    Template(
        "{name} has {a} {item}. {other} has {b} more. Then {other} loses {c}. How many {item} does {other} have?",
        lambda a, b, c: ((a, "+", b), (a + b, "-", c)),
    ),
    Template(
        "{name} has {a} {item}. {other} has {b} fewer. Then {other} gets {c} more. How many {item} does {other} have?",
        lambda a, b, c: ((a, "-", b), (a - b, "+", c)),
    ),
    Template(
        "{name} has {a} boxes with {b} {item} each and {c} more {item} in a bag. How many {item} does {name} have in all?",
        lambda a, b, c: ((a, "*", b), (a * b, "+", c)),
        product=True,
    ),
    Template(
        "{name} buys {a} bags of {b} {item}. {pronoun} gives {c} of the {item} to {other}. How many {item} are left?",
        lambda a, b, c: ((a, "*", b), (a * b, "-", c)),
        product=True,
    ),
)


def compute(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def equation(left: int, sign: str, right: int) -> str:
    return f"{left} {sign} {right} = {compute(left, sign, right)}."


def words(rng: random.Random) -> Words:
    name, other = rng.sample(sorted(NAMES), 2)
    return Words(name, NAMES[name], other, rng.choice(ITEMS))


def numbers(rng: random.Random, template: Template) -> tuple[int, int, int]:
    """a, b, c such that every result is in 0..99."""
    while True:
        a, b = (rng.randint(2, 9), rng.randint(2, 9)) if template.product else (rng.randint(3, 50), rng.randint(2, 30))
        c = rng.randint(2, 30)
        if all(0 <= compute(*step) <= LARGEST for step in template.steps(a, b, c)):
            return a, b, c


def make_task(train: int, test: int, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Records (instruction, input, output, answer); no (template, numbers) occurs twice, so train and test share no problem."""
    rng = random.Random(f"task {seed}")
    seen: set[tuple[int, tuple[int, int, int]]] = set()
    records: list[dict[str, str]] = []
    while len(records) < train + test:
        index = rng.randrange(len(TEMPLATES))
        template = TEMPLATES[index]
        values = numbers(rng, template)
        w = words(rng)
        if (index, values) in seen:
            continue
        seen.add((index, values))
        first, second = template.steps(*values)
        answer = compute(*second)
        text = template.text.format(**w._asdict(), a=values[0], b=values[1], c=values[2])
        output = f"First {equation(*first)} Then {equation(*second)} The answer is {answer}."
        records.append({"instruction": text, "input": "", "output": output, "answer": str(answer)})
    return records[:train], records[train:]


def make_pairs(records: list[dict[str, str]], seed: int = 0) -> list[dict[str, str]]:
    """Preferences (prompt, chosen, rejected) of records of `make_task`: the right answer, and one whose sums are right and which reads the
    question wrongly: it stops after the first step, its second step has the other sign, or its first number is another (in turn, where the
    results stay in 0..99)."""
    rng = random.Random(f"pairs {seed}")
    pairs = []
    for number, record in enumerate(records):
        left, sign, right, middle, then, last = _STEPS.fullmatch(record["output"]).groups()  # type: ignore[union-attr]
        a, b, c = int(left), int(right), int(last)
        wrong = f"First {equation(a, sign, b)} The answer is {middle}."
        others = [(a, "-" if then == "+" else "+")] if number % 3 == 1 else [(n, then) for n in range(2, LARGEST) if n != a]
        possible = [two for two in others if all(0 <= result <= LARGEST for result in _results(two[0], sign, b, two[1], c))]
        if number % 3 and possible:
            a, then = rng.choice(possible)
            half, whole = _results(a, sign, b, then, c)
            wrong = f"First {equation(a, sign, b)} Then {equation(half, then, c)} The answer is {whole}."
        pairs.append({"prompt": record["instruction"], "chosen": record["output"], "rejected": wrong})
    return pairs


_STEPS = re.compile(r"First (\d+) (.) (\d+) = (\d+)\. Then \d+ (.) (\d+) = .*")


def _results(a: int, first: str, b: int, then: str, c: int) -> tuple[int, int]:
    """Of both steps."""
    half = compute(a, first, b)
    return half, compute(half, then, c)


def make_pretraining(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Text records of the task's domain: equations, counting, worked sums, stories, one-step questions."""
    rng = random.Random(f"pretraining {seed}")
    makers = (_sums, _counting, _worked, _story, _question, _question)
    return [{"text": rng.choice(makers)(rng)} for _ in range(count)]


def _operation(rng: random.Random, start: int | None = None) -> tuple[int, str, int]:
    """A random step with a result in 0..99, from `start` if given."""
    while True:
        sign = rng.choice("+-*" if start is None else "+-")
        left = (
            start if start is not None else rng.randint(2, 9) if sign == "*" else rng.randint(0, LARGEST if sign == "-" else 60)
        )
        right = rng.randint(2, 9) if sign == "*" else rng.randint(0, 40)
        if 0 <= compute(left, sign, right) <= LARGEST:
            return left, sign, right


def _sums(rng: random.Random) -> str:
    return "Sums: " + " ".join(equation(*_operation(rng)) for _ in range(rng.randint(3, 6)))


def _counting(rng: random.Random) -> str:
    start, step = rng.randint(0, 60), rng.choice((1, 1, 1, 2, 5, 10))
    up = list(range(start, LARGEST + 1, step))[: rng.randint(3, 8)]
    return "Count: " + ", ".join(str(n) for n in (up if rng.random() < 0.5 else reversed(up))) + "."


def _worked(rng: random.Random) -> str:
    a, first, b = _operation(rng)
    middle = compute(a, first, b)
    _, second, c = _operation(rng, middle)
    end = compute(middle, second, c)
    steps = f"First {equation(a, first, b)} Then {equation(middle, second, c)}"
    return f"Compute {a} {first} {b} {second} {c}. {steps} The answer is {end}."


_CHANGES = {
    "+": ("buys {b} more", "finds {b} new ones", "gets {b} more", "picks {b} more"),
    "-": ("gives {b} to {other}", "loses {b} of them", "loses {b}"),
}


def _story(rng: random.Random) -> str:
    w = words(rng)
    have = rng.randint(3, 50)
    text = [f"{w.name} has {have} {w.item}."]
    for _ in range(rng.randint(1, 3)):
        _, sign, b = _operation(rng, have)
        have = compute(have, sign, b)
        text.append(f"{w.pronoun} {rng.choice(_CHANGES[sign]).format(b=b, other=w.other)}. Now {w.name} has {have} {w.item}.")
    return " ".join(text)


def _question(rng: random.Random) -> str:
    w = words(rng)
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        step, text = (a, "*", b), f"{w.name} has {a} boxes with {b} {w.item} each. How many {w.item} does {w.name} have in all?"
    elif kind == 1:
        a = rng.randint(3, 60)
        step = (a, "-", rng.randint(2, min(a, 40)))
        text = f"There are {a} {w.item} on the table. {w.name} takes {step[2]}. How many {w.item} are left?"
    elif kind == 2:
        a = rng.randint(3, 50)
        step = (a, rng.choice("+-"), rng.randint(2, min(a, 40)))
        more = "more" if step[1] == "+" else "fewer"
        text = f"{w.name} has {a} {w.item}. {w.other} has {step[2]} {more}. How many {w.item} does {w.other} have?"
    else:
        step = _operation(rng, rng.randint(3, 50))
        change = rng.choice(_CHANGES[step[1]]).format(b=step[2], other=w.other)
        text = f"{w.name} has {step[0]} {w.item}. {w.pronoun} {change}. How many {w.item} does {w.name} have now?"
    answer = f"First {equation(*step)} The answer is {compute(*step)}."
    # Half of them as a chat: a base must have met the marks of the format that it is tuned in.
    return f"[INST] {text} [/INST]{answer}" if rng.random() < 0.5 else f"{text} {answer}"


def make_tokenizer(folder: Path, vocab_size: int = 512) -> None:
    """A BPE of whole words and whole numbers, trained on the generated text, as tokenizer.json with its configs.

    A number 0..99 is one token: sums of two such tokens are facts that a model of two million weights can learn, where digits would
    have it learn carrying first. Characters outside the domain become <unk>.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Split(Regex("[.,?]"), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    counts = [f"Count: {' '.join(str(n) for n in range(LARGEST + 1))}"] * 3000  # every number becomes a token
    texts = [r["text"] for r in make_pretraining(20000, seed=1)]
    task = [text for r in make_task(4000, 0, seed=1)[0] for text in (f" {r['instruction']}", r["output"])]
    alphabet = [*(chr(c) for c in range(33, 127)), "\n"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*counts, *texts, *task], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = named | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", named)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def dump_records(path: Path, records: list[dict[str, str]]) -> None:
    """A JSON list with a record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n", encoding="utf-8")


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    """A record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bundled task and its base's text.")
    parser.add_argument("what", choices=("task", "pretrain", "tokenizer"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=100_000, help="pretrain: number of texts")
    options = parser.parse_args()
    if options.what == "task":
        train, test = make_task(4000, 400)
        dump_records(options.folder / "train.json", train)
        dump_records(options.folder / "test.json", test)
        write_lines(options.folder / "pairs.jsonl", make_pairs(train[:PAIRS]))
    elif options.what == "tokenizer":
        make_tokenizer(options.folder)
    else:
        write_lines(options.folder / "pretrain.jsonl", make_pretraining(options.records))


if __name__ == "__main__":
    main()
