"""Answers and log-likelihoods of a model that lies on a mesh are those of one device, for any number of prompts."""

import jax
import numpy as np
import pytest
from flax import nnx
from on_mesh import model_of

from moejax import mesh
from moejax.config_mesh import MeshConfig
from moejax.evaluation.generate import Sampling, generate
from moejax.evaluation.loglikelihood import loglikelihoods

CASE = {"preset": "mixtral-tiny", "sizes": {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1}, "backend": "loop"}
PROMPTS = [[int(i) for i in np.random.default_rng(n).integers(3, 64, 3 + n)] for n in range(5)]
PAIRS = [(prompt, [7, 9 + n]) for n, prompt in enumerate(PROMPTS)]
DRAWN = Sampling(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def parts():
    return model_of(CASE)


def said(model):
    """Five prompts on four devices: rows are filled up. Answers end at different steps on different devices."""
    more = dict(max_new_tokens=12, end=list(range(3, 9)), batch_size=3)
    answers = [generate(model, PROMPTS, sampling=sampling, **more) for sampling in (Sampling(), DRAWN)]
    return answers, np.array([score.loglikelihood for score in loglikelihoods(model, PAIRS, rows=3)])


@pytest.fixture(scope="module")
def expected(parts):
    return said(nnx.merge(*parts))


@pytest.mark.long
@pytest.mark.parametrize("weights", ["whole", "spread", "experts"])
def test_what_is_said(weights, parts, expected):
    graphdef, *states = parts
    devices = mesh.devices(MeshConfig(devices=4, weights=weights))
    model = nnx.merge(graphdef, *(jax.device_put(state, devices.of_weights(state)) for state in states))
    assert mesh.of_model(nnx.state(model)) == devices
    answers, scores = said(model)
    assert answers == expected[0] and len({len(answer) for answer in answers[1]}) > 1
    np.testing.assert_allclose(scores, expected[1], rtol=1e-5)


def test_the_mesh_of_a_model(parts):
    """Read from where its arrays lie."""
    graphdef, *states = parts
    assert mesh.of_model(nnx.state(nnx.merge(graphdef, *states))) is None
