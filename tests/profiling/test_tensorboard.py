"""TensorBoard really serves a run's scalars, pictures and trace together."""

import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

pytestmark = [
    pytest.mark.tensorboard,
    pytest.mark.skipif(
        importlib.util.find_spec("xprof") is None, reason="TensorBoard's profile plugin is missing: pip install -e '.[profile]'"
    ),
]


@pytest.fixture(scope="module")
def server(profiled, tmp_path_factory):
    """`tensorboard --logdir runs --host 127.0.0.1` on a free port: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(profiled.folder.parent)]
    log = tmp_path_factory.mktemp("tensorboard") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=output,
            env=os.environ | {"NO_PROXY": "*"},
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def ask(server, path, accept, **arguments):
    """The first answer that is accepted: the server needs some seconds to start and to read the folder."""
    url = f"{server}/data/{path}?{urllib.parse.urlencode(arguments)}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answer = "nothing"
    for _ in range(120):
        try:
            with opener.open(url, timeout=60) as response:
                content = response.read()
                packed = response.headers.get("Content-Encoding") == "gzip"
                answer = json.loads(gzip.decompress(content) if packed else content)
            if accept(answer):
                return answer
        except (urllib.error.URLError, ConnectionError) as error:
            answer = error
        time.sleep(0.5)
    raise AssertionError(f"{url}: {answer}")


def test_scalars_and_profile_side_by_side(server, profiled):
    name = profiled.folder.name
    ask(server, "plugin/scalars/tags", lambda tags: "loss/train" in tags.get(name, {}))
    runs = ask(server, "plugin/profile/runs", bool)
    (run,) = [run for run in runs if run.startswith(name)]
    tools = ask(server, "plugin/profile/run_tools", bool, run=run)
    assert {"trace_viewer@", "memory_viewer", "overview_page"} <= set(tools)
    (host,) = ask(server, "plugin/profile/hosts", bool, run=run, tag="trace_viewer@")
    trace = ask(server, "plugin/profile/data", bool, run=run, tag="trace_viewer@", host=host["hostname"])
    names = {event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"}
    assert {"train 3", "train 4"} <= names  # our steps
    assert any(name.startswith("moe/w1 backward: ") for name in names)  # our scopes
