"""Licences as packages state them, and what is said where nobody can be asked for weaknesses."""

import json
import sys
from email.message import Message
from types import SimpleNamespace

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import supply


@pytest.mark.parametrize(
    ("stated", "licence"),
    [
        ([("License-Expression", "MIT"), ("License", "other")], "MIT"),
        ([("Classifier", "Topic :: X"), ("Classifier", "License :: OSI Approved :: BSD License"), ("License", "text")], "BSD License"),
        ([("License", "Apache 2.0\nmore of it")], "Apache 2.0"),
        ([("License", " ")], None),
        ([], None),
    ],
)
def test_a_licence(stated, licence):
    metadata = Message()
    for name, value in stated:
        metadata[name] = value.replace("\n", "\n ")
    found = supply.licence(SimpleNamespace(metadata=metadata))
    assert found == licence


def test_all_dependencies_with_extras_are_found():
    found = supply.dependencies("moejax")
    assert {"jax", "jaxlib", "numpy", "aiohttp", "transformers"} <= found.keys()  # aiohttp: of fsspec[http]
    assert not {"moejax", "pytest", "lm-eval"} & found.keys()


def test_without_a_network_or_the_tool_that_is_said(monkeypatch):
    packages = {"x": SimpleNamespace(version="1")}
    monkeypatch.setattr(supply.shutil, "which", lambda *_, **__: None)
    assert supply.weaknesses(packages) == ([], "pip-audit is not installed (pip install pip-audit): known weaknesses were not looked up")
    monkeypatch.setattr(supply.shutil, "which", lambda *_, **__: "pip-audit")
    answers = ["", json.dumps({"dependencies": [{"name": "x", "version": "1", "vulns": [{"id": "CVE-1"}]}]})]
    monkeypatch.setattr(supply.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=answers.pop(0)))
    assert "could not be asked" in supply.weaknesses(packages)[1]
    assert supply.weaknesses(packages) == (["x 1: CVE-1"], "")
