"""Train a handed-over experiment in PyTorch; write metrics.jsonl, routing.jsonl and step_profile.json as moejax writes them.

    python benchmarks/pytorch/run.py HANDOVER --stack study|today|plain --out RUN [--profile] [--base dequantized]
    python benchmarks/pytorch/run.py HANDOVER --stack … --serve     answers every line "step" on stdin with one step's JSON line

Runs in the environment that `make reference4` (study, plain) or `make reference5` (today) builds; `benchmarks/torch_run.py` does both
sides' work. Exit code 2: it cannot run, and why; 3: out of memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import contract
import numpy as np
import profiled
import stacks
import torch
import tracing


class Trainer:
    """A side, its optimizer and its batches. `step` is one optimizer step, as `moejax.training.step` defines it."""

    def __init__(self, content: dict[str, Any], folder: Path, options: argparse.Namespace):
        self.content, self.options = content, options
        self.training = content["experiment"]["training"]
        torch.manual_seed(content["experiment"]["seed"])
        self.side = stacks.build(content, folder, options.stack, options)
        contract.compare(self.side.first, sum(p.numel() for p in self.side.trainable), content)
        if options.nudge:
            with torch.no_grad():
                self.side.trainable[0].mul_(1 + torch.finfo(torch.float32).eps)
        t = self.training
        self.optimizer = torch.optim.AdamW(
            self.side.trainable,
            lr=t["learning_rate"],
            betas=tuple(t["betas"]),
            eps=t["eps"],
            weight_decay=t["weight_decay"],
            fused=True,
        )
        with np.load(folder / "batches.npz") as file:
            self.batches = dict(file)
        self.done, self.steps, self.rates = 0, content["steps"], content["learning_rates"]
        self.top_k = content["model"]["experts_per_token"]

    def batch(self, number: int) -> dict[str, np.ndarray]:
        """Arrays [A, B, T]."""
        return {
            name: self.batches[f"{number}/{name}"] for name in ("tokens", "targets", "loss_mask", "segment_ids", "positions")
        }

    def step(self, number: int | None = None) -> dict[str, Any]:
        """The next optimizer step (on batch `number`, if given); the record of metrics.jsonl."""
        batch = self.batch(self.done if number is None else number)
        start = time.perf_counter()
        with tracing.scope("step"):
            loss, norm, probabilities = self._update(batch)
            loss_value, norm_value = loss.item(), norm.item()
            self._synchronize()
        seconds = time.perf_counter() - start
        self.done += 1
        lengths = [n for row in batch["segment_ids"].reshape(-1, batch["tokens"].shape[-1]) for n in np.bincount(row)[1:] if n]
        real = int((batch["segment_ids"] > 0).sum())
        record = {
            "step": self.done, "loss": loss_value, "learning_rate": self.rate, "grad_norm": norm_value, "step_seconds": seconds,
            "queries": len(lengths), "real_tokens": real, "padded_tokens": batch["tokens"].size,
            "supervised_tokens": int(batch["loss_mask"].sum()), "queries_per_second": len(lengths) / seconds,
            "tokens_per_second": real / seconds, "padded_tokens_per_second": batch["tokens"].size / seconds,
        }  # fmt: skip
        return record | self.memory() | self._routing(batch, probabilities)

    def _update(self, batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]]:
        arrays = {name: torch.from_numpy(a).to(self.options.device) for name, a in batch.items()}
        supervised = max(1.0, float(batch["loss_mask"].sum()))
        total, probabilities = torch.zeros((), device=self.options.device), []
        for micro in range(batch["tokens"].shape[0]):
            with tracing.scope("phase/forward"):
                loss, routed = self.side.forward({name: a[micro] for name, a in arrays.items()})
                loss = loss / supervised
            with tracing.scope("phase/backward"):
                loss.backward()
            total = total + loss.detach()
            probabilities.append(routed)
        with tracing.scope("optimizer"):
            norm = self._clip()
            self.rate = self.rates[min(self.done, len(self.rates) - 1)]
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total, norm, probabilities

    def _clip(self) -> torch.Tensor:
        """optax's rule: g · clip / norm where the norm exceeds clip; torch's own divides by norm + 1e-6."""
        grads = [p.grad for p in self.side.trainable if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.training["clip_norm"] is not None:
            torch._foreach_mul_(grads, torch.clamp(self.training["clip_norm"] / norm, max=1.0))
        return norm

    def _routing(self, batch: dict[str, np.ndarray], probabilities: list[list[torch.Tensor]]) -> dict[str, Any]:
        """Choices per layer and expert over real tokens, and of every layer the token nearest to another choice: by how much its K-th
        probability exceeds the next one, where it stands (micro-batch, row, position), and the two experts."""
        layers, k = len(probabilities[0]), self.top_k
        experts = self.content["model"]["experts"]
        counts = np.zeros((layers, experts), np.int64)
        nearest: list[Any] = [None] * layers
        for micro, routed in enumerate(probabilities):
            real = torch.from_numpy(batch["segment_ids"][micro].reshape(-1) > 0)
            places = torch.nonzero(real).flatten()
            for layer, p in enumerate(routed):
                values, chosen = p.cpu()[real].topk(min(k + 1, experts), dim=-1)
                counts[layer] += np.bincount(chosen[:, :k].flatten().numpy(), minlength=experts)
                if k < experts:
                    gaps = values[:, k - 1] - values[:, k]
                    token = int(gaps.argmin())
                    row, position = divmod(int(places[token]), batch["tokens"].shape[-1])
                    found = [float(gaps[token]), [micro, row, position], chosen[token, k - 1 : k + 1].tolist()]
                    if nearest[layer] is None or found[0] < nearest[layer][0]:
                        nearest[layer] = found
        return {"expert_counts": counts.tolist(), "nearest_ties": nearest}

    def memory(self) -> dict[str, int]:
        if self.options.device == "cuda":
            return {"device_peak_bytes": torch.cuda.max_memory_allocated()}
        return {
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        }

    def _synchronize(self) -> None:
        if self.options.device == "cuda":
            torch.cuda.synchronize()


def train(trainer: Trainer, out: Path, profile: dict[str, Any] | None) -> None:
    """All steps, to out/metrics.jsonl; those that `profile` names are traced."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "versions.json").write_text(json.dumps(versions(trainer)) + "\n", encoding="utf-8")
    first = last = 0
    if profile is not None:
        first, last = profile["start_step"], profile["start_step"] + profile["steps"] - 1
    records: list[dict[str, Any]] = []
    tracer = None
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(1, trainer.steps + 1):
            if number == first:
                tracer = profiled.start(trainer.options.device)
            records.append(trainer.step())
            if number == last and tracer is not None:
                profiled.stop(tracer, out / profiled.TRACE)
            lines.write(json.dumps(records[-1]) + "\n")
            lines.flush()
            if number % max(1, trainer.steps // 10) == 0 or number == 1:
                print(
                    f"step {number}/{trainer.steps}  loss {records[-1]['loss']:.4f}  {records[-1]['step_seconds']:.3f} s",
                    flush=True,
                )
    if profile is not None:
        profiled.write(trainer, records, first, last, out)


def serve(trainer: Trainer, rate: float | None = None) -> None:
    """Answers "step" with one step on the first batch, until stdin ends. rate: the device's measured matrix rate."""
    device = profiled.device_name(trainer.options.device)
    about = {
        "versions": versions(trainer),
        "device": device,
        "threads": torch.get_num_threads(),
        "backend": trainer.side.backend,
    }
    say({"ready": True, "matrix_rate_flops": rate, "compile_seconds": None} | about)
    for line in sys.stdin:
        if line.strip() != "step":
            say({"error": f'unknown command {line.strip()!r}: expected "step"'})
            continue
        record = trainer.step(0)
        say({name: record[name] for name in ("step_seconds", "loss", "queries", "real_tokens")} | trainer.memory())


def versions(trainer: Trainer) -> dict[str, str]:
    return {"torch": torch.__version__} | trainer.side.versions


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("handover", type=Path)
    parser.add_argument("--stack", choices=contract.STACKS, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true", help="trace the steps of the experiment's profile section")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--base", choices=("nf4", "dequantized"), default="dequantized", help="how NF4 weights are held")
    parser.add_argument("--scan", choices=("loop", "mamba_ssm"), default="loop", help="plain: the scan over time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--nudge", action="store_true", help="change the first trained weight by its last bit: what rounding alone does")
    parser.add_argument("--memory-fraction", type=float, default=1.0, help="of the GPU's memory, for two processes on one GPU")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    try:
        content = contract.read(options.handover)
        if options.device == "cuda":
            if not torch.cuda.is_available():
                raise contract.CannotRun(
                    f"torch {torch.__version__} finds no CUDA device: install its CUDA build in this environment"
                )
            torch.cuda.set_per_process_memory_fraction(options.memory_fraction)
        rate = profiled.peaks(options.device, content["experiment"]["training"]["compute_dtype"])[0] if options.serve else None
        trainer = Trainer(content, options.handover, options)
        if options.serve:
            serve(trainer, rate)
        else:
            train(trainer, options.out or options.handover, content["experiment"]["profile"] if options.profile else None)
    except contract.CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error):
            raise
        print(f"out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
