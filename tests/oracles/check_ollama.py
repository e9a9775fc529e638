"""Does Ollama read what `moejax export --format gguf` writes, and write a run's prompts? By its own code: check_ollama.go, built.

PYTHONPATH=tests python tests/oracles/check_ollama.py OLLAMA_READS
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from support import finished_run
from tiny_tokenizers import byte_level

from moejax.data import ollama
from moejax.data.supervision import prompt_of_talk
from moejax.errors import UserError
from moejax.runs import export

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def prompts(tokenizer, template):
    """Conversations, and what the run's template writes of each; of those that it has."""
    found = {}
    for kinds in ("u", "su", "uau", "suau", "uauau"):
        try:
            found[kinds] = prompt_of_talk(ollama._talk(kinds), tokenizer, template, kinds)[0]
        except UserError:
            assert "s" in kinds
    talks = [[{"role": ROLES[kind], "content": content} for kind, content in ollama._said(kinds)] for kinds in found]
    return talks, list(found.values())


def check(reader, folder, template, kind):
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "tokenizer")
    experiment = finished_run(folder / "run", tokenizer=str(folder / "tokenizer"), data={"source": "x.json", "template": template})
    export.export(folder / "run", folder / "out", "gguf", False, None, None, kind)
    talks, expected = prompts(export._tokenizer(experiment, folder), template)
    (folder / "talks.json").write_text(json.dumps(talks))
    ran = subprocess.run([reader, folder / "out", folder / "talks.json"], capture_output=True, text=True, check=True)
    read = json.loads(ran.stdout)
    assert read["prompts"] == expected, (read["prompts"], expected)
    assert (read["files"], read["architecture"], read["type"].lower()) == (1, "llama", kind)
    stops = read["parameters"]["stop"]
    print(f"data.template = {template}, {kind}: {len(expected)} prompts as the run's, {read['tensors']} tensors, stops {stops}")


def main():
    reader = Path(sys.argv[1]).resolve()
    for template, kind in [("chat", "f16"), ("chatml", "q8_0"), ("mistral", "bf16"), ("alpaca", "f16")]:
        with tempfile.TemporaryDirectory() as folder:
            check(reader, Path(folder), template, kind)


if __name__ == "__main__":
    main()
