"""bitsandbytes 0.50.2's AdamW8bit on a CPU, and its CUDA kernel written out in torch: tests/vectors/adam8.npz. Run: make vectors.

Both take the same gradients, which `drawn.gradient` makes here and in the tests. The kernel's rule (csrc/kernels.cu of bitsandbytes:
`kOptimizerStatic8bit2StateBlockwise`, `quantize_2D`, and `kOptimizer32bit2State` for small parameters) is followed line by line and
number by number in its search for a code; its fast divisions and powers are exact here. Its blocks, maps and dequantized numbers are
checked against bitsandbytes' own functions where those have the same rule.
"""

import json
import math

import bitsandbytes
import bitsandbytes.functional as F
import numpy as np
import torch
from drawn import GRADIENT_STEPS, gradient, weight
from mixtral import OUT

SHAPES = {"matrix": (96, 100), "first": (40, 112), "second": (40, 112), "limit": (64, 64), "small": (63, 65)}
"""37.5 blocks; two of 17.5, which a stack must keep apart; the smallest that has codes; the largest that has none."""
RATE, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.1
SMALLEST, BLOCK = 4096, 256


def search(x, numbers, signed):
    """quantize_2D: int codes of x, by its own halving."""
    pivot = torch.full(x.shape, 127)
    upper_pivot, lower_pivot = torch.full(x.shape, 255), torch.zeros(x.shape, dtype=torch.long)
    lower, upper = torch.full(x.shape, -1.0 if signed else 0.0), torch.ones(x.shape)
    value = numbers[pivot]
    for i in (64, 32, 16, 8, 4, 2, 1):
        above = x > value
        lower_pivot, upper_pivot = torch.where(above, pivot, lower_pivot), torch.where(above, upper_pivot, pivot)
        lower, upper = torch.where(above, value, lower), torch.where(above, upper, value)
        pivot = torch.where(above, pivot + i, pivot - i)
        value = numbers[pivot]
    up = torch.where(x > (upper + value) * 0.5, upper_pivot, pivot)
    down = torch.where(x < (lower + value) * 0.5, lower_pivot, pivot)
    return torch.where(x > value, up, down)


class Kernel:
    """One parameter and its moments."""

    def __init__(self, parameter):
        self.p, self.t, self.eight = parameter.clone(), 0, parameter.numel() >= SMALLEST
        self.maps = F.create_dynamic_map(signed=True), F.create_dynamic_map(signed=False)
        blocks = -(-parameter.numel() // BLOCK)
        self.exact = [None, None]
        self.largest = [torch.zeros(blocks), torch.zeros(blocks)]
        self.moments = [torch.zeros(parameter.numel(), dtype=torch.uint8 if self.eight else torch.float32) for _ in range(2)]

    def read(self, which):
        if not self.eight:
            return self.moments[which]
        return self.maps[which][self.moments[which].long()] * self.largest[which].repeat_interleave(BLOCK)[: self.p.numel()]

    def write(self, which, values):
        self.exact[which] = values
        if not self.eight:
            self.moments[which] = values
            return
        blocks = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).reshape(-1, BLOCK)
        self.largest[which] = blocks.abs().amax(1)
        x = values / self.largest[which].repeat_interleave(BLOCK)[: values.numel()]
        codes = search(x, self.maps[which], signed=which == 0)
        if which == 0:
            other = torch.signbit(self.maps[0][codes]) != torch.signbit(values)
            codes = torch.where(other, torch.where(values > 0, codes + 1, codes - 1), codes)
        self.moments[which] = codes.to(torch.uint8)

    def step(self, grad):
        self.t += 1
        g, (b1, b2) = grad.reshape(-1), (float(np.float32(b)) for b in BETAS)
        correction1, correction2 = 1 - b1**self.t, math.sqrt(1 - b2**self.t)
        v = self.read(1) * b2 + (1 - b2) * g * g
        m = self.read(0) * b1 + (1 - b1) * g
        change = -RATE * correction2 / correction1 * (m / (v.sqrt() + correction2 * EPS))
        self.p = (self.p + change.reshape(self.p.shape)) * (1 - RATE * DECAY)
        self.write(0, m)
        self.write(1, v)


def by_bitsandbytes(start):
    """The same steps by AdamW8bit, with its CPU's rule."""
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = bitsandbytes.optim.AdamW8bit(parameters.values(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step in range(GRADIENT_STEPS):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradient(name, step, SHAPES[name]))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}, optimizer.state


def check(kernel):
    """Where bitsandbytes' functions have the same rule: the map read back, the largest of each block. And the codes: how many are not the
    nearest, and how many the table has otherwise."""
    for which, kind in enumerate(("first", "second")):
        numbers, values, codes = kernel.maps[which], kernel.exact[which], kernel.moments[which]
        back = F.dequantize_blockwise(codes, absmax=kernel.largest[which], code=numbers, blocksize=BLOCK)
        assert torch.equal(back, kernel.read(which))
        by_table, state = F.quantize_blockwise(values, code=numbers, blocksize=BLOCK)
        assert torch.equal(state.absmax, kernel.largest[which])
        x = values / state.absmax.repeat_interleave(BLOCK)[: len(values)]
        nearest = (x[:, None].double() - numbers.double()).abs().argmin(1)
        kept = (which == 0) & (nearest == 127) & torch.signbit(values)  # of a negative number, that its sign stays
        print(f"{kind}: of {len(codes)} codes {int((nearest - kept.long() != codes.long()).sum())} not the nearest,", end=" ")
        print(f"{float((by_table != codes).float().mean()):.1%} otherwise by the table")


def main():
    torch.set_num_threads(1)
    start = {name: torch.from_numpy(weight(name, shape)) for name, shape in SHAPES.items()}
    kernels = {name: Kernel(value) for name, value in start.items()}
    for step in range(GRADIENT_STEPS):
        for name, kernel in kernels.items():
            kernel.step(torch.from_numpy(gradient(name, step, SHAPES[name])))
    check(kernels["matrix"])
    theirs, _ = by_bitsandbytes(start)
    out = {
        "versions": json.dumps({"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__}),
        "settings": json.dumps({"rate": RATE, "betas": BETAS, "eps": EPS, "decay": DECAY, "shapes": SHAPES}),
        "signed_map": F.create_dynamic_map(signed=True).numpy(),
        "unsigned_map": F.create_dynamic_map(signed=False).numpy(),
    }
    for name, kernel in kernels.items():
        moved = (kernel.p - start[name]).abs()
        print(name, "off by the table's rule", float(((theirs[name] - kernel.p).abs() > 1e-3 * moved).float().mean()))
        out[f"{name}/kernel"], out[f"{name}/cpu"] = kernel.p.numpy(), theirs[name].numpy()
        for which, kind in enumerate(("first", "second")):
            out[f"{name}/{kind}"] = kernel.moments[which].numpy()
            if kernel.eight:
                out[f"{name}/{kind}/largest"] = kernel.largest[which].numpy()
    np.savez_compressed(OUT / "adam8.npz", **out)


if __name__ == "__main__":
    main()
