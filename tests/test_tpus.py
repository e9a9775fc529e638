"""TPU slices by name."""

import pytest

from moejax import tpus
from moejax.errors import UserError


@pytest.mark.parametrize("name", ["v5e-8", "V5E-8", "tpu-v5e-8", "TPU v5e 8", "v5e8"])
def test_a_slice_by_its_names(name):
    found = tpus.find(name)
    assert (found.name, found.count, found.topology, found.chip.platform) == ("v5e-8", 8, "v5e:2x4", "tpu")


def test_what_is_no_tpu_and_what_is_no_slice():
    assert tpus.find("V100-16") is None and tpus.find("H100") is None
    with pytest.raises(UserError, match="unknown TPU 'v5e-3': did you mean v5e-"):
        tpus.find("v5e-3")
    with pytest.raises(UserError, match="2 TPU chips of v5p: expected one of v5p-8"):
        tpus.of(tpus.CHIPS["v5p"], 2)
