"""llama.cpp, by cyllama's wheel (the extra `llamacpp`): logits, tokens and the quantizer of a GGUF file."""

import numpy as np
import pytest

library = pytest.importorskip("cyllama.llama.llama_cpp", reason="needs the extra llamacpp: make test-long installs it")
library.disable_logging()
CONTEXT = 512
Q4_K_M = 15  # llama.h's LLAMA_FTYPE_MOSTLY_Q4_K_M


class Model(library.LlamaModel):
    """n_vocab: what get_logits_ith asks its model for, and does not find."""

    @property
    def n_vocab(self):
        return self.get_vocab().n_vocab


def load(path):
    how = library.LlamaModelParams()
    how.n_gpu_layers, how.use_extra_bufts = 0, False
    return Model(str(path), how)


def logits(model, texts):
    """fp32 [T, V] of each text's ids; keys and values in fp32."""
    how = library.LlamaContextParams()
    how.n_ctx = how.n_batch = how.n_ubatch = CONTEXT
    how.n_threads = how.n_threads_batch = 1
    how.type_k = how.type_v = how.flash_attn_type = 0  # fp32; flash attention is disabled
    context = library.LlamaContext(model, how)
    for ids in texts:
        context.kv_cache_clear()
        batch = library.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch([int(i) for i in ids], 0, True)
        context.decode(batch)
        yield np.array([context.get_logits_ith(i) for i in range(len(ids))], np.float32)


def encode(model, text):
    """Ids with what the tokenizer puts around a text; control tokens in it are tokens."""
    return list(model.get_vocab().tokenize(text, True, True))


def quantize(path, target, kind=Q4_K_M):
    how = library.LlamaModelQuantizeParams()
    how.ftype, how.nthread = kind, 1
    library.model_quantize(str(path), str(target), how)
