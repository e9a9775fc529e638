"""Seconds per LoRA train step of a Mixtral in PyTorch (transformers 4.57.6 + PEFT 0.18.1): the other side of `make bench`.

Runs in the environment that `make reference4` builds. One step is forward, backward through checkpointed layers, clipping, AdamW, and
reading the loss: what moejax's step does. Weights are random, and so are tokens: one full batch, every token but a row's first a target.

    python benchmarks/pytorch/mixtral_lora_step.py            one warm-up and 10 timed steps; prints one JSON line
    python benchmarks/pytorch/mixtral_lora_step.py --serve    says {"ready": true, …}, then answers each line "step" on stdin with one
                                                              JSON line, so that a caller can interleave steps of two frameworks
"""

import argparse
import json
import resource
import statistics
import sys
import time

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

TARGETS = ["w1", "w2", "w3", "gate"]
SIZES = {
    "layers": 8,
    "hidden": 512,
    "intermediate": 1024,
    "experts": 8,
    "experts_per_token": 2,
    "heads": 8,
    "kv_heads": 4,
    "vocab": 2048,
    "rows": 4,
    "row_tokens": 512,
    "lora_rank": 16,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"default {size}")
    parser.add_argument("--lora-alpha", type=float, default=32.0)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=0, help="default 0: as many as PyTorch takes by itself")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after one that is not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help='run one step for every line "step" on stdin')
    settings = parser.parse_args(arguments)
    if settings.steps < 1:
        parser.error(f"--steps {settings.steps}: expected at least 1")
    return settings


def build_model(settings: argparse.Namespace) -> torch.nn.Module:
    """fp32, every layer recomputed in the backward pass, LoRA on all experts and routers."""
    config = MixtralConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        num_local_experts=settings.experts,
        num_experts_per_tok=settings.experts_per_token,
        max_position_embeddings=settings.row_tokens,
        sliding_window=None,
        use_cache=False,
        attn_implementation=settings.attention,
    )
    base = MixtralForCausalLM(config)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, adapter).train()


class TrainStep:
    """A model, its optimizer and one batch; each call is one step."""

    def __init__(self, settings: argparse.Namespace):
        torch.manual_seed(settings.seed)
        self.model = build_model(settings)
        self.trainable = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=settings.learning_rate, weight_decay=0.0, fused=True)
        self.ids = torch.randint(settings.vocab, (settings.rows, settings.row_tokens))

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        # No attention mask: all tokens are real, and without one sdpa takes its fastest causal kernel.
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        value = loss.item()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"step_seconds": seconds, "loss": value, "host_peak_bytes": peak}

    def describe(self, settings: argparse.Namespace) -> dict[str, object]:
        return {
            "framework": "pytorch",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
            "threads": torch.get_num_threads(),
            "sizes": {name: getattr(settings, name) for name in SIZES},
            "lora_alpha": settings.lora_alpha,
            "lora_targets": TARGETS,
            "params_total": sum(weight.numel() for weight in self.model.parameters()),
            "params_trainable": sum(weight.numel() for weight in self.trainable),
            "precision": "float32",
            "gradient_checkpointing": True,
            "attention": settings.attention,
            "optimizer": "AdamW, fused",
        }


def say(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)


def serve(step: TrainStep, settings: argparse.Namespace) -> None:
    """Answers "step" with one step, until stdin ends. The first step is a warm-up: whether it counts is the caller's choice."""
    say({"ready": True} | step.describe(settings))
    for line in sys.stdin:
        command = line.strip()
        say(step() if command == "step" else {"error": f'unknown command {command!r}: expected "step"'})


def measure(step: TrainStep, settings: argparse.Namespace) -> None:
    warm_up = step()
    steps = [step() for _ in range(settings.steps)]
    seconds = [one["step_seconds"] for one in steps]
    median = statistics.median(seconds)
    result = {
        "median_step_seconds": median,
        "tokens_per_second": settings.rows * settings.row_tokens / median,
        "step_seconds": seconds,
        "warm_up_seconds": warm_up["step_seconds"],
        "losses": [one["loss"] for one in (warm_up, *steps)],
    }
    say(step.describe(settings) | result)


def main() -> None:
    settings = parse_arguments()
    if settings.threads > 0:
        torch.set_num_threads(settings.threads)
    step = TrainStep(settings)
    if settings.serve:
        serve(step, settings)
    else:
        measure(step, settings)


if __name__ == "__main__":
    main()
