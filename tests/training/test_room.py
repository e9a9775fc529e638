"""XLA's words of memory that is not there: sizes read from them, and the batch that would fit."""

import jax
import pytest

from moejax.errors import UserError
from moejax.training import loop, room
from moejax.training.program import TrainProgram

TPU_COMPILER = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.93G of 15.48G hbm. Exceeded hbm "
    "capacity by 5.45G.\n\nTotal hbm usage >= 21.45G:\n    reserved        530.01M"
)
TPU_TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.98G) exceeds available HBM (15.75G)."
)
TPU = (
    "RESOURCE_EXHAUSTED: Error loading program 'jit_step': Attempting to reserve 29.49G at the bottom of memory. That was not possible. "
    "There are 147.64M free, 0B reserved, and 147.64M reservable."
)


@pytest.mark.parametrize(
    ("text", "wanted", "available"),
    [
        (TPU_COMPILER, 20.93 * 2**30, 15.48 * 2**30),
        (TPU, 29.49 * 2**30, 147.64 * 2**20),
        ("Error allocating device buffer: Attempting to allocate 5.94M. That was not possible. There are 4.20M free.; (0x0x0_HBM0)",
         5.94 * 2**20, 4.2 * 2**20),
        (TPU_TEMPORARIES, 19.98 * 2**30, 15.75 * 2**30),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 33762398024 bytes.", 33762398024, None),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB.", 2**33, None),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0", 2.99 * 2**30, None),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.", 4096, None),
        ("Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem.", None, None),  # of one kernel: no batch mends it
    ],
)  # fmt: skip
def test_sizes_in_the_words_of_gpus_and_tpus(text, wanted, available):
    assert room.read(text) == (pytest.approx(wanted), available if available is None else pytest.approx(available))


def test_rows_by_two_peaks():
    peaks = {4: 5.0, 8: 9.0}
    assert [room.rows_within(peaks.get, 8, limit) for limit in (0.5, 1.9, 2.0, 7.5, 99.0)] == [0, 0, 1, 6, 7]
    assert room.rows_within(peaks.get, 8, 7.5, 4) == 4 and room.rows_within(peaks.get, 1, 99.0) == 0


@pytest.mark.parametrize(
    ("text", "told", "fits"),
    [(TPU_COMPILER, r"asks for 22\.47 GB with 8 rows, 16\.62 GB are usable", 6),
     (TPU_TEMPORARIES, r"asks for 21\.4\d GB with 8 rows, 16\.91 GB are usable", 7)],
)  # fmt: skip
def test_a_step_that_a_tpu_refuses_to_compile(text, told, fits, make_experiment, monkeypatch):
    """Asked for the batch that fits, the compiler refuses once. Of temporaries alone arguments count next to them."""
    compiled, refused = TrainProgram._compiled, []

    def refuse(self, lowering, options):
        monkeypatch.setattr(TrainProgram, "_compiled", compiled)
        refused.append(text)
        raise jax.errors.JaxRuntimeError(text)

    step = TrainProgram(make_experiment(), make_experiment().model.architecture(None))
    monkeypatch.setattr(TrainProgram, "_compiled", refuse)
    with pytest.raises(UserError, match=told + rf" on cpu; data\.batch_rows={fits} would fit \(keep the batch"):
        step.compile_within(8, 64, None)
    assert step.peak_of(8, 64) > 2e10 and len(refused) == 1 and list(step.compiled) == [(4, 64)]


@pytest.mark.parametrize(
    ("text", "told"),
    [(TPU, r"Attempting to reserve 29\.49G .*There are 147\.64M free.*had asked for 0\.00 GB with 4 rows.*Not even one row would fit"),
     ("RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 0.50M. That was not possible. There are 0.25M free.",
      r"0\.00 GB were free: data\.batch_rows=[1-3] would fit \(keep the batch"),
     ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB.", r"8\.00GiB\..*another process .*Lower data\.batch_rows \(")],
)  # fmt: skip
def test_a_device_that_has_no_room_for_a_step(text, told, make_experiment, monkeypatch):
    def full(self, batch):
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(TrainProgram, "step", full)
    with pytest.raises(UserError, match=rf"out of memory at step 1: .*{told}"):
        loop.run(make_experiment(data={"holdout": 0}), resume=False)
