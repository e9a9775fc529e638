"""The models that PyTorch's side trains, from a handed-over folder: `study`, `today` and `plain` (contract.STACKS).

A `Side` has the weights to train and, for one micro-batch, the summed loss and every MoE layer's router probabilities.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import contract
import torch
import torch.nn.functional as F
import tracing

from moejax.hub import names
from moejax.models.families.attention_moe import AttentionMoEConfig


class Side:
    """What `run.py` asks of a stack. versions: of its libraries; backend: how its experts run; first: digests of the loaded weights."""

    versions: dict[str, str]
    backend: str
    trainable: list[torch.nn.Parameter]
    first: dict[str, str]

    def digests(self) -> Iterator[tuple[str, str]]:
        """Hub name and digest of every weight as it was loaded, by the rule of benchmarks/handover.py."""
        raise NotImplementedError

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """batch: tokens, targets, loss_mask, segment_ids, positions, each [B, T]. Summed loss; probabilities [B·T, E] by layer."""
        raise NotImplementedError


def build(content: dict[str, Any], folder: Path, stack: str, options: Any) -> Side:
    contract.check(content, stack)
    side: type[Any] = {"study": Transformers, "today": StackedTransformers, "plain": BlackMamba}[stack]
    return side(content, folder, options)


def _digest(*arrays: torch.Tensor) -> str:
    total = hashlib.sha256()
    for a in arrays:
        total.update(a.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _loss(logits: torch.Tensor, batch: dict[str, torch.Tensor], smoothing: float) -> torch.Tensor:
    """Σ mask · cross-entropy in fp32. logits: [B, T, V]."""
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), batch["targets"].long().flatten(), reduction="none", label_smoothing=smoothing
    )
    return (losses * batch["loss_mask"].flatten()).sum()


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Transformers(Side):
    """transformers 4 and PEFT 0.18: a module per expert, a LoRA pair per module. Tensors' names follow from the architecture."""

    backend = "transformers 4, a loop over experts"
    module: str | None = None
    """What it calls the experts' half of a layer; None: what the family's files do."""
    experts: ClassVar[dict[str, str]] = {}
    """What says how the experts run: transformers 4 has one way."""

    def __init__(self, content: dict[str, Any], folder: Path, options: Any):
        import peft
        import transformers

        self.versions = {"transformers": transformers.__version__, "peft": peft.__version__}
        e, self.sizes = content["experiment"], contract.architecture(content)
        assert isinstance(self.sizes, AttentionMoEConfig)  # contract.check
        self.training, self.device = e["training"], torch.device(options.device)
        self.dtype = getattr(torch, self.training["compute_dtype"])
        # It has no token for padding: the embedding of one would have no gradient.
        config = transformers.AutoConfig.for_model(**content["hub_config"], use_cache=False)
        self.how = {"dtype": self.dtype, "attn_implementation": "sdpa"} | self.experts
        self.codes: dict[str, str] = {}
        self.full = e["adapter"] is None
        quantization = e["quantization"] if e["quantization"]["format"] == "nf4" else None
        base: Any
        if content["base"] is None:
            base = self._random(config, quantization)
        else:
            # Like moejax, quantize what the file holds, and cast afterwards.
            wide = quantization is not None and content["digests"] is not None
            how = self.how | ({"dtype": torch.float32} if wide else {})
            with _quietly():
                base = transformers.AutoModelForCausalLM.from_pretrained(content["base"], config=config, **how)
            if quantization:
                self._quantize(base, quantization, options.base)
            for weight in base.parameters() if wide else ():
                if weight.is_floating_point():
                    weight.data = weight.data.to(self.dtype)
        base.to(self.device)
        self.base = base
        self.first = dict(self.digests()) if content["digests"] else {}
        if self.training["remat"] == "full":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = (base if self.full else self._adapted(base, folder / "adapter", content["base"] is None)).train()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.probabilities: list[torch.Tensor] = [torch.empty(0)] * len(base.model.layers)
        moe = self.module or self.sizes.module
        for layer, block in enumerate(base.model.layers):
            self._watch(layer, getattr(block, moe).gate)
        tracing.name_scopes(self.model, moe, self.sizes.target_names)

    def _quantize(self, base: Any, quantization: dict[str, Any], form: str) -> None:
        """4-bit linear layers of bitsandbytes, or (form "dequantized") its codes turned back once into the weights they stand for."""
        for path, module in self._to_quantize(base, quantization):
            weight = _wide(module.weight)
            codes, state = _nf4(weight, quantization["double"])
            self.codes[f"{path}.weight"] = _digest_nf4(codes, state)
            if form == "dequantized":
                module.weight.data = _dequantized(codes, state)
            else:
                base.is_loaded_in_4bit = True
                base.set_submodule(path, self._linear4bit(module, weight, quantization["double"]))

    def _to_quantize(self, base: Any, quantization: dict[str, Any]) -> list[tuple[str, Any]]:
        import bitsandbytes

        self.versions["bitsandbytes"] = bitsandbytes.__version__
        wanted = {path for group in quantization["modules"] for path in self.sizes.groups[group]}
        return [(n, base.get_submodule(n)) for n, place in names.modules(self.sizes).items() if place.path in wanted]

    def _linear4bit(self, module: Any, weight: torch.Tensor, double: bool) -> Any:
        import bitsandbytes

        linear = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=self.dtype, compress_statistics=double,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type="nf4")
        return linear.to(self.device)

    def _random(self, config: Any, quantization: dict[str, Any] | None) -> Any:
        """Random weights made on the device, a matrix at a time: a model in NF4 never exists in 16 bits."""
        import transformers
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False), _quietly():
            base: Any = transformers.AutoModelForCausalLM.from_config(config, **self.how)

        def normal(shape: torch.Size) -> torch.Tensor:
            return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=0.02)

        for path, module in self._to_quantize(base, quantization) if quantization else []:
            base.is_loaded_in_4bit = True
            base.set_submodule(path, self._linear4bit(module, normal(module.weight.shape), quantization["double"]))
        for path, module in list(base.named_modules()):
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.is_meta:
                    made = normal(weight.shape)
                    setattr(module, name, torch.nn.Parameter(made.fill_(1.0) if "norm" in path else made, self.full))
        return base

    def _adapted(self, base: Any, folder: Path, random: bool) -> Any:
        """With moejax's initial adapter; or with a new one of its settings."""
        from peft import LoraConfig, PeftModel, get_peft_model

        with _quietly():
            if random:
                settings = LoraConfig.from_pretrained(folder)
                settings.inference_mode = False  # the file is written as of a finished adapter
                return get_peft_model(base, settings)
            return PeftModel.from_pretrained(base, folder, is_trainable=True)

    def digests(self) -> Iterator[tuple[str, str]]:
        for name, weight in self.base.state_dict().items():
            plain = name.replace(".base_layer", "")
            if plain in self.codes:
                yield plain, self.codes[plain]
            elif "lora_" not in name and name.endswith(".weight"):
                yield plain, _digest(_wide(weight))

    def _watch(self, layer: int, router: Any) -> None:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            self.probabilities[layer] = torch.softmax(logits.detach().float(), -1)

        router.register_forward_hook(keep)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        segments, arguments = batch["segment_ids"], {}
        if int(segments.max()) > 1:
            t = segments.shape[1]
            causal = torch.ones(t, t, dtype=torch.bool, device=segments.device).tril()
            mask = (segments[:, None, :, None] == segments[:, None, None, :]) & causal
            arguments = {"attention_mask": mask, "position_ids": batch["positions"].long()}
        # Padding stands on the right, so causal attention alone keeps it from every real token.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = self.base.model(input_ids=batch["tokens"].long(), **arguments).last_hidden_state
            with tracing.scope("loss"):
                loss = _loss(self.base.lm_head(hidden), batch, self.training["label_smoothing"])
        return loss, list(self.probabilities)


class StackedTransformers(Transformers):
    """transformers 5 and PEFT 0.21: a parameter over all experts, adapted as one: w1 and w3 share one A."""

    backend = "transformers 5, grouped_mm"
    module = "mlp"
    experts: ClassVar = {"experts_implementation": "grouped_mm"}

    def digests(self) -> Iterator[tuple[str, str]]:
        stacked, renamed = names.stacked(self.sizes), names.renamed(self.sizes)
        for name, weight in self.base.state_dict().items():
            for part in stacked.get(name, ()):
                matrix = weight[part.expert]
                yield part.name, _digest(_wide(matrix if part.half is None else matrix.chunk(2)[part.half]))
            if name not in stacked:
                yield renamed.get(name, name), _digest(_wide(weight))


class BlackMamba(Side):
    """benchmarks/pytorch/blackmamba.py, every weight trained."""

    def __init__(self, content: dict[str, Any], folder: Path, options: Any):
        import blackmamba

        self.module, self.versions = blackmamba, {}
        self.training = content["experiment"]["training"]
        self.dtype = getattr(torch, self.training["compute_dtype"])
        hub, dtype = content["hub_config"], getattr(torch, self.training["param_dtype"])
        if content["base"] is None:
            weights = blackmamba.random(content["shapes"], dtype, options.device)
        else:
            weights = blackmamba.load(Path(content["base"]), dtype)[0]
        self.weights = {name: torch.nn.Parameter(w.detach().to(options.device)) for name, w in weights.items()}
        self.trainable = list(self.weights.values())
        self.sizes, self.k, self.activation = blackmamba.sizes_of(hub), hub["topk"], hub["activation"]
        self.kernel = options.scan == "mamba_ssm"
        self.backend = f"plain PyTorch, a loop over experts, scan: {options.scan}"
        if self.kernel:
            self.versions["mamba_ssm"] = blackmamba.kernel_version(options.device)
        self.first = dict(self.digests()) if content["digests"] else {}

    def digests(self) -> Iterator[tuple[str, str]]:
        for name, weight in self.weights.items():
            yield name, _digest(_wide(weight))

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if self.kernel and int(batch["segment_ids"].max()) > 1:
            raise contract.CannotRun(
                "data.batching = pack: PyTorch's side cannot express it with --scan mamba_ssm: the kernel carries its state over from "
                "one query of a row to the next. Use data.batching=pad_longest, or --scan loop"
            )
        hidden, _, probabilities = self.module.hidden_states(
            self.weights, batch["tokens"].long(), self.sizes, self.k, self.activation, segments=batch["segment_ids"],
            dtype=self.dtype, remat=self.training["remat"] == "full", kernel=self.kernel,
        )  # fmt: skip
        with tracing.scope("loss"):
            logits = hidden @ self.weights["embedding.word_embeddings.weight"].to(hidden.dtype).T
            loss = _loss(logits, batch, self.training["label_smoothing"])
        return loss, [p.flatten(0, 1) for p in probabilities]


def _wide(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().float()


def _nf4(weight: torch.Tensor, double: bool) -> tuple[torch.Tensor, Any]:
    """bitsandbytes' codes. On one thread: its offset is a mean, and threads change the order of that sum."""
    import bitsandbytes.functional as functional

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    finally:
        torch.set_num_threads(threads)
    return codes, state


def _digest_nf4(codes: torch.Tensor, state: Any) -> str:
    nested = (state.state2.absmax, state.offset) if state.nested else ()
    return _digest(codes, state.absmax, *nested)


def _dequantized(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """code · absmax in fp32, spelled out: bitsandbytes' own kernel is wrong on some CPUs where a row is no multiple of 64."""
    absmax = state.absmax
    if state.nested:
        second = state.state2
        scale = second.absmax.repeat_interleave(second.blocksize)[: absmax.numel()]
        absmax = second.code[absmax.long()] * scale + state.offset
    flat = codes.flatten()
    values = state.code[torch.stack([flat >> 4, flat & 15], dim=1).flatten().long()]
    return (values[: state.shape.numel()] * absmax.repeat_interleave(state.blocksize)[: state.shape.numel()]).reshape(
        state.shape
    )
