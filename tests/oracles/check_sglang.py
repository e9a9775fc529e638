"""Does SGLang load what `moejax export --for sglang` writes? In an environment of its own (requirements-sglang.txt).

.venv/bin/python tests/oracles/write_adapter.py /tmp/check PRESET sglang
SGLANG_USE_CPU_ENGINE=1 .venv-sglang/bin/python tests/oracles/check_sglang.py /tmp/check

Its own model on a CPU, and its own LoRAManager over it: the adapter's names and shapes, the modules that it wraps, and every pair as it
stands in the buffers that its kernels read. Nothing is computed with them: on a CPU that takes sgl_kernel, which PyPI has for CUDA alone
(and Intel's AMX). Stand-ins for that package and for torchvision, so that the modules import, are all that is not SGLang's.
"""

import importlib.abc
import importlib.machinery
import socket
import sys
import types
from pathlib import Path

import torch
from safetensors.numpy import load_file
from transformers.utils import is_torchvision_available, is_torchvision_v2_available

RANK, SCALE = 4, 8 / 4  # write_adapter.py's


class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})

    def __call__(cls, *_, **__):
        return cls


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        away = name.partition(".")[0] in ("torchvision", "sgl_kernel")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if away else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(Anything("module", (), {}), name)
        return module

    def exec_module(self, module):
        pass


def without_pinning():
    """Pinned memory takes an accelerator."""
    plain = torch.tensor
    torch.tensor = lambda *arguments, **more: plain(*arguments, **{key: value for key, value in more.items() if key != "pin_memory"})


def manager_of(folder):
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.model_loader import get_model
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    ref = LoRARef(lora_name="ours", lora_path=str(folder / "adapter"), pinned=False)
    arguments = ServerArgs(
        model_path=str(folder / "base"), device="cpu", attention_backend="torch_native", skip_tokenizer_init=True, dtype="float32",
        enable_lora=True, lora_paths=[ref], lora_backend="torch_native", lora_strict_loading=True,
    )  # fmt: skip
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
    config = ModelConfig.from_server_args(arguments)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    bootstrap.init_distributed_environment(
        backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=f"tcp://127.0.0.1:{port}"
    )
    bootstrap.initialize_model_parallel()
    bootstrap.initialize_dp_attention(server_args=arguments)
    bootstrap.init_layer_runtime(model_config=config)
    initialize_moe_config()
    load = LoadConfig()
    model = get_model(model_config=config, load_config=load, device_config=DeviceConfig("cpu"))
    manager = LoRAManager(
        base_model=model, base_hf_config=config.hf_config, max_loras_per_batch=2, load_config=load, dtype=torch.float32,
        server_args=arguments, lora_backend="torch_native", lora_paths=[ref],
    )  # fmt: skip
    manager.fetch_new_loras({ref.lora_id})
    return manager, manager.memory_pool.uid_to_buffer_id[ref.lora_id]


def deltas(manager, slot, layer):
    """Name behind `model.layers.N.` -> B A as the kernels read them. SGLang scales experts' B where it loads them, others' later."""
    pool = manager.memory_pool
    buffers = {name: (pool.A_buffer[name][layer][slot], pool.B_buffer[name][layer][slot]) for name in pool.A_buffer}
    wrapped = {name.partition(f"layers.{layer}.")[2] for name in manager.lora_modules[layer]}
    scale = manager.loras[next(iter(manager.loras))].scaling
    found = {}
    for path in wrapped:
        before, _, module = path.rpartition(".")
        if module == "experts":
            (a13, b13), (a2, b2) = buffers["gate_up_proj_moe"], buffers["down_proj_moe"]
            half = b13.shape[1] // 2
            for expert in range(len(a13)):
                pairs = {
                    "w1": (a13[expert, :RANK], b13[expert, :half]), "w3": (a13[expert, RANK:], b13[expert, half:]),
                    "w2": (a2[expert], b2[expert]),
                }  # fmt: skip
                found |= {f"{path}.{expert}.{name}": b @ a for name, (a, b) in pairs.items()}
        elif module == "qkv_proj":
            config, (a, b) = manager.base_hf_config, buffers[module]
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            sizes = [head * count for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
            for number, (name, rows) in enumerate(zip("qkv", b.split(sizes), strict=True)):
                found[f"{before}.{name}_proj"] = scale * rows @ a[number * RANK : (number + 1) * RANK]
        else:
            a, b = buffers[module]
            found[path] = scale * b @ a
    return found


def main():
    is_torchvision_available(), is_torchvision_v2_available()  # transformers looks once, and finds none
    sys.meta_path.insert(0, Absent())
    without_pinning()
    folder = Path(sys.argv[1])
    manager, slot = manager_of(folder)
    import sglang

    ours = load_file(folder / "adapter/adapter_model.safetensors")
    as_ours = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    expected = {}
    for name in {name.rpartition(".lora_")[0] for name in ours}:
        before, _, module = name.removeprefix("base_model.model.model.layers.").rpartition(".")
        expected[f"{before}.{as_ours.get(module, module)}"] = SCALE * ours[f"{name}.lora_B.weight"] @ ours[f"{name}.lora_A.weight"]
    found = {f"{layer}.{name}": delta for layer in range(2) for name, delta in deltas(manager, slot, layer).items()}
    worst = max(float((found[name] - torch.from_numpy(delta)).abs().max()) for name, delta in expected.items() if name in found)
    left = expected.keys() ^ found.keys()
    print(f"SGLang {sglang.__version__}: {len(found)} pairs loaded, {len(left)} left over, largest difference of a delta {worst:.2g}")
    return worst > 1e-5 or bool(left)


if __name__ == "__main__":
    sys.exit(int(main()))
