"""An operation without jax, whose candidates are sabotaged: a child process of it starts in a moment. (No tests: imported by children.)"""

import os
import time

import numpy as np

from moejax.tuner.registry import Candidate, Case


def shapes(experiment, config):
    return [{"size": 64}]


def candidates(device, shape):
    return [Candidate("portable", {"form": "portable"}), Candidate("tomorrow's", {"form": "x"}, why_not="needs another card")]


def build(device, shape, entry):
    def slow(x):
        time.sleep(0.01)
        return x * 2, [x + 1]

    return slow


def cases(shape):
    yield Case("numbers", (np.arange(shape["size"], dtype=np.float32),), True)
    yield Case("nothing", (np.zeros(0, np.float32),))


def faster(device, shape, entry):
    return lambda x: (x * 2, [x + 1])


def wrong(device, shape, entry):
    return lambda x: (x * 2, [x + 1 + 1e-3 * (x == 5)])


def unwritten(device, shape, entry):
    return lambda x: (np.where(x == 63, np.nan, x * 2), [x + 1])


def restless(device, shape, entry):
    return lambda x: (x * 2 + 1e-7 * np.float32(time.time_ns() % 97), [x + 1])


def raises(device, shape, entry):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate")


def hangs(device, shape, entry):
    time.sleep(1000)


def dies(device, shape, entry):
    os.abort()


def sabotaged(device, shape):
    for make in (wrong, dies, faster):
        yield Candidate(make.__name__, {"form": make.__name__}, built_by=f"toy_operation:{make.__name__}")
    yield Candidate("hangs", {"form": "hangs"}, built_by="toy_operation:hangs", seconds=0.4)
