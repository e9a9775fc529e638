"""How far a config scales, on paper: bytes and seconds by number of cards and by what each holds, with the same rows on every card.

    python benchmarks/scaling.py --config configs/mixtral_8x7b_cs_sparse.yaml --gpu H100 --rows 8 --tokens 512 [--devices 1,2,8,64]

GB: of each card, by the closed form; receives: of each in a step, and its seconds over the link (estimator/links.json, 80 % of its rate;
--link in its place); program: seconds of the program's roofline (estimator/own.py: nobody has timed it), with as many tokens for every
device's experts; of n: what n cards do in a step over n times what one does that waits for nothing. Nothing is taken to hide behind work.
No jax.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import kept

from moejax import config, gpus
from moejax.commands.arguments import counts_of, names_of, on_devices, with_weights
from moejax.errors import UserError
from moejax.estimator import closed_form, links, memory, own, spread
from moejax.estimator.sizes import architecture_of

COLUMNS = ("cards", "weights", "GB", "receives, GB", "link", "s", "program, s", "tokens/s", "of n")


def lines(
    experiment: Any, gpu: gpus.GPU, counts: list[int], rows: int, tokens: int, link: links.Link | None
) -> tuple[list[list[str]], list[str]]:
    """(of the table, why others are none)."""
    sizes, found, stops = architecture_of(experiment), [], []
    experiment = own.settled(experiment.with_defaults(sizes))
    alone = own.program_seconds(experiment.model_copy(update={"mesh": None}), sizes, gpu, rows, tokens)
    limit = memory.by_closed_form(memory.usable_bytes(gpu, experiment.device.memory_fraction))[0]
    for n in counts:
        for weights in ("whole",) if n == 1 else ("whole", "spread", "experts"):
            try:
                e = on_devices(with_weights(experiment, weights), sizes, n)
                over = None if n == 1 else link or links.between(gpu, n)
            except UserError as error:
                stops.append(str(error))
                continue
            held = closed_form.on(gpu, e, sizes, n * rows, tokens).total
            moved = spread.traffic(e, sizes, n * rows * tokens).total
            program, waited = own.program_seconds(e, sizes, gpu, n * rows, tokens), 0.0 if over is None else moved / over.rate
            rate = n * e.training.gradient_accumulation * rows * tokens / (program + waited)
            gb = f"{held / 1e9:.1f}" + ("" if held <= limit else " (too much)")
            between = ["", "", ""] if over is None else [f"{moved / 1e9:.2f}", over.name, f"{waited:.3f}"]
            share = f"{100 * alone / (program + waited):.0f} %" if held <= limit else ""
            found.append([f"{n}", weights, gb, *between, f"{program:.3f}", f"{rate:,.0f}", share])
    return found, list(dict.fromkeys(stops))


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["configs/mixtral_8x7b_cs_sparse.yaml"])
    parser.add_argument("--gpu", default="H100", help="comma-separated")
    parser.add_argument("--devices", default="1,2,4,8,16,32,64")
    parser.add_argument("--rows", type=int, default=8, help="on each card")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--link", type=float, help="GB/s that a card receives")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_intermixed_args()
    link = None if options.link is None else links.given(options.link)
    for path in options.config:
        experiment = config.load(path, options.overrides)
        for name in names_of(options.gpu):
            print(f"\n{experiment.name} on {name}, {options.rows} x {options.tokens} tokens a card\n")
            print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
            found, stops = lines(experiment, gpus.find(name), counts_of(options.devices), options.rows, options.tokens, link)
            print("\n".join(f"| {' | '.join(line)} |" for line in found))
            print("".join(f"\nnone: {why}" for why in stops))
    return 0


if __name__ == "__main__":
    sys.exit(main())
