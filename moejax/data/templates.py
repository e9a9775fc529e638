"""How a record becomes a prompt and an answer."""

from __future__ import annotations

from typing import Any

from moejax.data import chat
from moejax.data.records import Record

_HEAD = "Below is an instruction that describes a task"
_TAIL = "Write a response that appropriately completes the request."


def render(template: str, record: Record, tokenizer: Any, where: str = "") -> tuple[str, str]:
    """(prompt, answer). Nothing stands before the prompt; but for `chat`, an answer's end is appended as a token later.

    mistral: `[INST] {question} [/INST]` + answer, as the study has it, without a begin-of-sequence token; the question is the
    instruction, and the input after a line break where there is one. alpaca: Stanford Alpaca's two forms. chat: the tokenizer's own
    chat template, which writes the answer too, with the end of the turn. text: everything is answer. where: the record, for messages.
    """
    if template == "text":
        return "", record["text"]
    if template in ("chat", "chatml"):
        return chat.rendered(tokenizer, _question(record), record["output"], where)
    return prompt_of(template, record, tokenizer, where), record["output"]


def prompt_of(template: str, record: Record, tokenizer: Any, where: str = "") -> str:
    """The prompt alone: an answer is not there, or is not looked at."""
    if template == "mistral":
        return f"[INST] {_question(record)} [/INST]"
    if template == "alpaca":
        return _alpaca(record)
    return chat.rendered(tokenizer, _question(record), None, where).prompt if template in ("chat", "chatml") else ""


def asked(template: str, question: str, system: str, first: bool) -> str:
    """A question of a conversation, in `mistral` or `alpaca`; first: with what the system says, in the place of Alpaca's first lines. Later
    ones stand behind the answer before them, as LLaMA-Factory has it."""
    if template == "mistral":
        return "[INST] " + "\n\n".join(text for text in (system, question) if text) + " [/INST]"
    head = (system or f"{_HEAD}. {_TAIL}") if first else ""
    return f"{head}\n\n### Instruction:\n{question}\n\n### Response:\n"


def _question(record: Record) -> str:
    return f"{record['instruction']}\n{record['input']}" if record["input"] else str(record["instruction"])


def _alpaca(record: Record) -> str:
    if record["input"]:
        return (
            f"{_HEAD}, paired with an input that provides further context. {_TAIL}\n\n"
            f"### Instruction:\n{record['instruction']}\n\n### Input:\n{record['input']}\n\n### Response:\n"
        )
    return asked("alpaca", record["instruction"], "", first=True)
