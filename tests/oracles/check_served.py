"""Does vLLM load what moejax exports? In .venv-vllm (requirements-vllm.txt).

.venv/bin/python tests/oracles/write_adapter.py /tmp/check PRESET                  # every target; a rank for each group
.venv-vllm/bin/python tests/oracles/check_served.py loaded /tmp/check              # its loader: names, and every pair as it packs them
.venv/bin/python tests/oracles/write_adapter.py /tmp/check PRESET no-experts
.venv-vllm/bin/python tests/oracles/check_served.py served /tmp/check              # its engine, with the adapter: our logits
PYTHONPATH=tests .venv/bin/python tests/oracles/write_export.py /tmp/merged        # a run, merged
.venv-vllm/bin/python tests/oracles/check_served.py merged /tmp/merged             # its engine, with the merged model: our logits

vLLM's experts for CPUs take no adapters, so an adapter on experts is read and packed by vLLM here, and computed on GPUs alone.
"""

import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
import vllm
from safetensors.numpy import load_file
from vllm import LLM, SamplingParams
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_supported_lora_modules, process_packed_modules_mapping
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

RANKS = {"gate": 2} | dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 8)  # write_adapter.py's; the experts' is 4, alpha 8


def engine(model, **arguments):
    return LLM(
        str(model), skip_tokenizer_init=not (model / "tokenizer.json").exists(), dtype="float32", enforce_eager=True, max_model_len=128,
        max_num_seqs=4, max_logprobs=-1, logprobs_mode="raw_logits", disable_log_stats=True, **arguments,
    )  # fmt: skip


def model_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def logits(llm, tokens, **arguments):
    """fp32 [T - 1, V]: of every position but the last, for rows of tokens [T]."""
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
    found = []
    for row in tokens.tolist():
        (output,) = llm.generate({"prompt_token_ids": row}, asked, use_tqdm=False, **arguments)
        of = [[position[id_].logprob for id_ in range(len(position))] for position in output.prompt_logprobs[1:]]
        found.append(np.array(of, np.float32))
    return found


def compare(found, expected):
    worst = max(float(np.abs(one - other[:-1]).max()) for one, other in zip(found, expected, strict=True))
    largest = float(np.abs(expected).max())
    print(f"vLLM {vllm.__version__}: logits differ by {worst:.2g} of {largest:.3g}")
    return worst > 1e-4 * max(1.0, largest)


def loaded(folder):
    model = model_of(engine(folder / "base"))
    supported, packed = get_supported_lora_modules(model), process_packed_modules_mapping(model)
    expected = {name for module in supported for name in [*packed.get(module, [module]), *(["experts"] if module == "experts" else [])]}
    helper = PEFTHelper.from_local_dir(str(folder / "adapter"), 2048)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    read = LoRAModel.from_local_checkpoint(
        str(folder / "adapter"), expected, helper, device="cpu", dtype=torch.float32, weights_mapper=mapper and mapper.get_rename_mapper()
    )
    ours = load_file(folder / "adapter/adapter_model.safetensors")
    deltas = {}
    for name in {name.rpartition(".lora_")[0] for name in ours}:
        module = name.removeprefix("base_model.model.")
        a, b = (ours[f"{name}.lora_{letter}.weight"] for letter in "AB")
        deltas[module] = 8 / RANKS.get(module.rpartition(".")[2], 4) * b @ a
    worst, seen = 0.0, set()
    for layer in range(2):
        prefix = next(name for name in deltas if name.startswith(f"model.layers.{layer}.") and ".experts." in name).partition("experts.")[0]
        names = [prefix + name for name in packed["experts"]]
        pairs = PackedLoRALayerWeights.pack_moe([read.loras.pop(name, None) for name in names], f"{prefix}experts").optimize()
        for at, name in enumerate(names):
            delta = pairs.lora_b[at % 3][at // 3] @ pairs.lora_a[at % 3][at // 3]
            worst, seen = max(worst, float(np.abs(delta.numpy() - deltas[name]).max())), seen | {name}
    for name, pair in read.loras.items():
        pair.optimize()
        worst, seen = max(worst, float(np.abs((pair.lora_b @ pair.lora_a).numpy() - deltas[name]).max())), seen | {name}
    left = deltas.keys() - seen
    print(f"vLLM {vllm.__version__}: {len(seen)} pairs loaded, {len(left)} left over, largest difference of a delta {worst:.2g}")
    return worst > 1e-5 or bool(left)


def experts_of_cpu():
    """With adapters vLLM takes its Triton kernels for experts; those that have none may be computed as without."""
    settled = FusedMoEConfig.__post_init__

    def without(config):
        settled(config)
        object.__setattr__(config, "is_lora_enabled", False)

    FusedMoEConfig.__post_init__ = without


def served(folder):
    experts_of_cpu()
    with np.load(folder / "logits.npz") as file:
        tokens, base, tuned = file["tokens"], file["base"], file["tuned"]
    print(f"the adapter changes them by {np.abs(tuned - base).max():.2g}; ", end="")
    llm = engine(folder / "base", enable_lora=True, max_lora_rank=8, lora_target_modules=["qkv_proj", "o_proj", "gate"])
    print("without the adapter: ", end="")
    wrong = compare(logits(llm, tokens), base)
    return compare(logits(llm, tokens, lora_request=LoRARequest("ours", 1, str(folder / "adapter"))), tuned) or wrong


def merged(folder):
    with np.load(folder / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    return compare(logits(engine(folder / "merged"), tokens[None]), expected[None])


if __name__ == "__main__":
    sys.exit(int({"loaded": loaded, "served": served, "merged": merged}[sys.argv[1]](Path(sys.argv[2]))))
