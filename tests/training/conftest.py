"""A tiny experiment on the bundled problems."""

import pytest
from support import tiny_experiments


@pytest.fixture
def make_experiment(tmp_path):
    """make_experiment(section={field: value}) -> Experiment whose runs lie in tmp_path."""
    return tiny_experiments(tmp_path)
