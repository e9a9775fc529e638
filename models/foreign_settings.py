"""Settings that others wrote (config.json, adapter_config.json): what is not known to be computed here is named, so that it is refused.

A table says for each key what is known of it: `ANY` (it is read, or changes nothing that is computed), a tuple (the values that mean
what is computed here), or a table of its own (for a group of settings). A key that no table has may pass only where it says nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

ANY: Final = None
Table = Mapping[str, Any]


def uncomputed(settings: Mapping[str, Any], known: Table, ignored: Collection[str] = (), prefix: str = "") -> Iterator[str]:
    """`name = value`, with what is expected where one value is, of every setting that would compute something else than here."""
    for key, value in settings.items():
        name = prefix + key
        expected = known.get(key, ())
        if name.partition(".")[0] in ignored or (key in known and expected is ANY) or value is None:
            continue
        if isinstance(expected, Mapping):
            if isinstance(value, Mapping):
                yield from uncomputed(value, expected, ignored, f"{name}.")
            elif value:
                yield f"{_said(name, value)} (expected names and values)"
        elif key not in known:
            if value is not False and value not in ("", [], {}):  # 0 says something
                yield _said(name, value)
        elif value not in expected:
            yield f"{_said(name, value)} (expected {' or '.join(json.dumps(e) for e in expected)})"


def check(settings: Mapping[str, Any], known: Table, ignored: Collection[str]) -> None:
    """Raises ValueError where a config.json has a setting that is not known to be computed here, or ids that are none."""
    for name, several in (("bos_token_id", ""), ("eos_token_id", " several,")):
        value = settings.get(name)
        ids = value if several and isinstance(value, list) else [value]
        if any(type(id_) is not int for id_ in ids) and value is not None:
            raise ValueError(f"{_said(name, value)}: expected the number of a token,{several} or null")
    found = list(uncomputed(settings, known, ignored))
    if found:
        keys = dict.fromkeys(re.split("[ .]", text)[0] for text in found)
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise ValueError(
            f"config.json has {', '.join(found[:6])}{more}: not known to be computed here, so the model could give other numbers. "
            f"Give another model; or, if you know that this changes nothing, set model.ignored_settings=[{','.join(keys)}]"
        )


def whole_number(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size. Raises KeyError where it is missing and has no default, ValueError where it is no whole number, or one that no array has."""
    value = settings[name] if default is None else settings.get(name, default)
    if type(value) is not int or abs(value) >= 2**31:
        raise ValueError(f"{_said(name, value)}: expected a whole number{' below 2,147,483,648' if type(value) is int else ''}")
    return value


def same(found: Table) -> Any:
    """What one setting is that a file may say in several places; None: nowhere. Raises ValueError where they differ."""
    said = {name: value for name, value in found.items() if value is not None}
    values = list(said.values())
    if any(value != values[0] for value in values):
        raise ValueError(f"{', '.join(_said(*each) for each in said.items())}: expected the same")
    return values[0] if values else None


def number(settings: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A real number that a float can hold. Raises ValueError where it is something else."""
    value = settings.get(name, default)
    if type(value) not in (int, float):
        raise ValueError(f"{_said(name, value)}: expected a number")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{_said(name, value)}: expected a number up to {sys.float_info.max:.2g}")
    return value  # type: ignore[no-any-return]


def _said(name: str, value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{name} = {text if len(text) <= 120 else text[:117] + '…'}"


_TOKENS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id")
_GENERATION = (
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens",
    "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p",
    "typical_p",
)  # fmt: skip
_METADATA = (
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation", "_name_or_path", "architectures",
    "attn_implementation", "chunk_size_feed_forward", "dtype", "finetuning_task", "id2label", "initializer_range", "is_decoder",
    "label2id", "max_sequence_length", "model_max_length", "model_type", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "task_specific_params", "tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
)  # fmt: skip
HARMLESS: dict[str, Any] = dict.fromkeys((*_TOKENS, *_GENERATION, *_METADATA), ANY)
"""What transformers writes into any config.json that changes nothing of a forward pass: it may have any value."""

BITSANDBYTES: Table = {
    "quant_method": ("bitsandbytes",), "load_in_4bit": (True,), "_load_in_4bit": (True,), "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_use_double_quant": ANY, "bnb_4bit_compute_dtype": ANY, "bnb_4bit_quant_storage": ANY, "llm_int8_threshold": ANY,
    "llm_int8_skip_modules": ANY, "llm_int8_enable_fp32_cpu_offload": ANY, "llm_int8_has_fp16_weight": ANY,
}  # fmt: skip
MXFP4: Table = {"quant_method": ("mxfp4",), "modules_to_not_convert": ANY, "dequantize": ANY}
"""What `quantization_config` says of a family whose experts may come in MXFP4 (`Architecture.expert_format`)."""
