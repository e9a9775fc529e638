"""How a record becomes a prompt and an answer."""

from __future__ import annotations

from typing import Any

from moejax.data.sources import Record
from moejax.errors import UserError


def render(template: str, record: Record, tokenizer: Any) -> tuple[str, str]:
    """(prompt, answer). The end of sequence is appended as a token later; nothing stands before the prompt.

    mistral: `[INST] {question} [/INST]` + answer, as the study has it, without a begin-of-sequence token; the question is the
    instruction, and the input after a line break where there is one. alpaca: Stanford Alpaca's two forms. chat: the tokenizer's own
    chat template. text: everything is answer.
    """
    if template == "text":
        return "", record["text"]
    question = f"{record['instruction']}\n{record['input']}" if record["input"] else record["instruction"]
    if template == "mistral":
        return f"[INST] {question} [/INST]", record["output"]
    if template == "alpaca":
        return _alpaca(record), record["output"]
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "data.template = chat: this tokenizer has no chat template; use mistral or alpaca, or another tokenizer"
        )
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(prompt), record["output"]


def _alpaca(record: Record) -> str:
    head = "Below is an instruction that describes a task"
    tail = "Write a response that appropriately completes the request.\n\n"
    if record["input"]:
        return (
            f"{head}, paired with an input that provides further context. {tail}"
            f"### Instruction:\n{record['instruction']}\n\n### Input:\n{record['input']}\n\n### Response:\n"
        )
    return f"{head}. {tail}### Instruction:\n{record['instruction']}\n\n### Response:\n"
