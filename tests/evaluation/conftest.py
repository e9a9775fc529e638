"""What several files of this folder use."""

import pytest
from support import finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run with an adapter that changes its answers."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    finished_run(folder)
    return folder
