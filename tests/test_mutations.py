"""The faults that `make test-long` puts in fit the code and the tests that are there now."""

import mutations
from support import ROOT


def test_every_fault_fits():
    for fault in mutations.FAULTS:
        for file, old, _ in fault.edits:
            assert (ROOT / file).read_text().count(old) == 1, (fault.name, file)
        for test in fault.tests:
            file, _, name = test.partition("::")
            assert f"def {name.rpartition('::')[2].partition('[')[0]}" in (ROOT / file).read_text(), (fault.name, test)
