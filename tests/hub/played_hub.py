"""A server that plays the Hub on this machine, and a process that streams a model from it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support import ROOT

SHA, ID = "a" * 40, "org/name"

CHILD = """
import json, sys
from pathlib import Path
from moejax import config
from huggingface_hub import constants
from moejax.hub import model, shards

constants.DOWNLOAD_CHUNK_SIZE = 1024  # of a file that is cut: what came before is kept in whole chunks

def used(pattern):
    return sum(p.stat().st_size for p in Path(sys.argv[2]).glob(pattern) if p.is_file())

keep, peak = shards._keep, 0
def watched(*arguments):
    global peak
    keep(*arguments)
    peak = max(peak, used("**/*") - used("*/*.safetensors"))  # the shard is still there
shards._keep = watched
folder = model.base_folder(config.Experiment.model_validate(json.loads(sys.argv[1])))
print(json.dumps([str(folder), peak]))
"""


class Hub:
    """A repository of one commit. Shards have Git LFS' hashes and lie, as on the Hub, behind a redirect to another host, which sends
    ranges; counts what is fetched, and ends a process in the middle of a file. troubles: by shard, what happens once: "busy" (503 to
    HEAD), "often" (429), "down" (503), "cut" (the connection ends in the middle)."""

    def __init__(self, folder, troubles):
        self.fetched, self.resumed, self.troubles, self.kill_at, self.child = [], [], troubles, None, None
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rpartition("/")[2]
                if "/tree/" in self.path:
                    tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                    self.answer(json.dumps(tree).encode())
                elif self.path.startswith("/api/"):
                    self.answer(json.dumps({"id": ID, "sha": SHA, "siblings": [{"rfilename": n} for n in files]}).encode())
                elif self.path.startswith("/cdn/"):
                    self.shard(name, files[name])
                else:
                    etag = hashlib.sha256(files[name]).hexdigest()
                    headers = {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Repo-Commit": SHA}
                    if not name.endswith(".safetensors"):
                        self.answer(files[name], headers)
                    elif self.command == "HEAD" and hub.happens(name, "busy"):
                        self.answer(b"", status=503)
                    else:
                        elsewhere = f"http://localhost:{hub.server.server_port}/cdn/{name}"
                        self.answer(b"", headers | {"X-Linked-Size": str(len(files[name])), "Location": elsewhere}, 302)

            do_HEAD = do_GET

            def shard(self, name, content):
                if hub.happens(name, "down"):
                    self.answer(b"", status=503)
                    return
                if hub.happens(name, "often"):
                    self.answer(b"", {"Retry-After": "0"}, 429)
                    return
                first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
                (hub.resumed if first else hub.fetched).append(name)
                cut = hub.happens(name, "cut")
                where = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if first else {}
                self.answer(content[first:], where, 206 if first else 200, half=cut or name == hub.kill_at)
                if name == hub.kill_at:
                    os.kill(hub.child.pid, signal.SIGKILL)
                self.close_connection = cut

            def answer(self, content, headers=(), status=200, half=False):
                self.send_response(status)
                for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **dict(headers)}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[: len(content) // 2] if half else content)
                    self.wfile.flush()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def happens(self, name, what):
        """Whether it does, this once."""
        return self.troubles.get(name) == what and bool(self.troubles.pop(name))

    def stream(self, asked, kill_at=None):
        """What a process of its own gives and fetches."""
        self.fetched, self.resumed, self.kill_at = [], [], kill_at
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        cache = asked.quantization.cache
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD, asked.model_dump_json(exclude={"made_of"}), cache],
            env=clean | {"HF_HOME": f"{cache}-hub", "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        out, _ = self.child.communicate()
        assert self.child.returncode == (0 if kill_at is None else -signal.SIGKILL)
        return None if kill_at else json.loads(out.splitlines()[-1])
