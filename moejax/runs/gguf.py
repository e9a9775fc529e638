"""A run's model as a GGUF file for llama.cpp, and a Modelfile for Ollama next to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from moejax.config import Experiment
from moejax.data import gguf_tokenizer, ollama
from moejax.data.ends import ends_of
from moejax.data.templates import prompt_of
from moejax.data.tokenizer import check_vocabulary
from moejax.documents import read_json
from moejax.errors import UserError
from moejax.files import replace_text
from moejax.hub import gguf_file, merge
from moejax.hub.layerwise import Checkpoint
from moejax.models.build import Model
from moejax.models.config import Architecture
from moejax.progress import say
from moejax.runs import beside

TOLERANCE = {"f16": 0.05, "bf16": 0.05, "q8_0": 0.1}
"""As `runs.export` has it."""
ROUNDING = {"f16": 0.0, "bf16": 0.0, "q8_0": 0.0045}
"""Beyond half of the last bit of what is read: half a step of a block's 255, its scale rounded to f16. Of a matrix's largest number."""


class Plan(NamedTuple):
    """A file that can be written. metadata: the tokenizer's and the name; modelfile: "" where there is none."""

    file: str
    kind: str
    sizes: Architecture
    metadata: dict[str, Any]
    modelfile: str

    @property
    def nbytes(self) -> int:
        return gguf_file.file_bytes(self.sizes, self.kind)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.kind]

    @property
    def rounding(self) -> float:
        return ROUNDING[self.kind]

    @property
    def told(self) -> str:
        beside = "a Modelfile for Ollama next to it" if self.modelfile else "without a tokenizer: it takes and gives token ids"
        return f"{self.kind} GGUF file {self.file}, {beside}"

    @property
    def use(self) -> str:
        """What runs it, in Markdown."""
        if not self.modelfile:
            return "A GGUF file for llama.cpp without a tokenizer: it takes and gives token ids."
        return f"```\nllama-server -m {self.file}\nollama create NAME -f Modelfile\n```"

    def write(self, model: Model, base: Path, folder: Path, advance: Callable[[int], None]) -> None:
        """Raises UserError as `merge.save_merged` does, and for a number that f16 does not hold; OSError for a full disk."""
        with merge.opened(model, base) as value:
            gguf_file.write(folder / self.file, self.sizes, self.kind, value, self.metadata, advance)
        if self.modelfile:
            replace_text(folder / "Modelfile", self.modelfile)

    def checkpoint(self, folder: Path) -> Checkpoint:
        """What was written, to be compared."""
        path = folder / self.file
        stored = {"f16": jnp.float16, "bf16": jnp.bfloat16, "q8_0": jnp.float32}[self.kind]
        written = gguf_file.read_sizes(path, self.sizes)
        return Checkpoint(written, folder, (), {"param_dtype": stored}, opened=lambda *_: gguf_file.open_tensors(path, written, self.kind))


def plan(experiment: Experiment, sizes: Architecture, base: Path, tokenizer: Any, kind: str, with_tokenizer: bool) -> Plan:
    """Raises UserError where llama.cpp cannot hold the model or the tokenizer, before anything is written. tokenizer: the run's."""
    gguf_file.check(sizes, kind)
    file = f"{Path(experiment.name).name}-{kind}.gguf"
    named = {"general.name": experiment.name}
    if not with_tokenizer:
        return Plan(file, kind, sizes, named | gguf_tokenizer.none(), "")
    if tokenizer is None:
        raise UserError("--format gguf: this run has no tokenizer: --without-tokenizer writes a file for token ids")
    check_vocabulary(tokenizer, sizes.vocab_size)
    tokenizer.chat_template = beside.template_of(tokenizer, base)
    template = experiment.data.template or "mistral"
    ends = ends_of(tokenizer, template, base)
    record = {"instruction": "A question", "input": "", "output": "", "text": ""}
    metadata = gguf_tokenizer.metadata(tokenizer, sizes.vocab_size, ends.ids, prompt_of(template, record, tokenizer))
    if gguf_tokenizer.spaces_first(tokenizer):
        begin = "text" if metadata["tokenizer.ggml.add_space_prefix"] else "a control token"
        say(
            "this tokenizer puts a space before a text alone, llama.cpp before every piece of one or none: prompts that begin with "
            f"{begin}, as this run's, become the same tokens there"
        )
    generation = base / "generation_config.json"
    sampled = read_json(generation) if generation.is_file() else {}
    text, told = ollama.modelfile(file, tokenizer, template, ends, sampled, metadata["tokenizer.ggml.add_bos_token"])
    if not told:
        say(f"the Modelfile has no TEMPLATE: what data.template = {template} writes is not told by pieces; write one for Ollama")
    return Plan(file, kind, sizes, named | metadata, text)
