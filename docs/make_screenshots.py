"""Photograph TensorBoard's Profile tab on a run of ours, for docs/profiling.md. Needs Chromium and the extra `profile`.

python docs/make_screenshots.py RUNS OUT     e.g. runs docs/profiling; RUNS holds one profiled run
"""

import argparse
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

SIZE = (1280, 800)
# Where the trace viewer is zoomed, by how many strokes of W (each makes events 1.5 times as wide), and what is then selected: in docs' own
# trace the second step, and a layer's backward pass in it; in another one, something else is there.
STEP, STROKES = (600, 300), 2
LAYER, MORE = (760, 320), 4
SELECTED = 760, 320


class Browser:
    """A headless Chromium, spoken to in its DevTools protocol through two pipes (no driver, no port)."""

    def __init__(self, profile: str):
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        binary = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
        if binary is None:
            raise SystemExit("no Chromium here: apt-get install chromium")
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--no-proxy-server", "--hide-scrollbars",
            f"--window-size={SIZE[0]},{SIZE[1]}", f"--user-data-dir={profile}", "--remote-debugging-pipe",
        ]  # fmt: skip
        # Chromium reads from descriptor 3 and writes to 4.
        shell = f'exec "$@" 3<&{to_child} 4>&{from_child}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", binary, *options, "about:blank"],
            pass_fds=(to_child, from_child), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []  # what it told unasked, of the domains that were enabled
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.ask("Emulation.setDeviceMetricsOverride", width=SIZE[0], height=SIZE[1], deviceScaleFactor=1, mobile=False)

    def ask(self, method: str, **parameters: Any) -> Any:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._in, 1 << 20)
            answer, _, self._rest = self._rest.partition(b"\0")
            decoded = json.loads(answer)
            if decoded.get("id") == self._number:
                if "error" in decoded:
                    raise RuntimeError(f"{method}: {decoded['error']['message']}")
                return decoded["result"]
            self.events.append(decoded)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> None:
        """Wait until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                raise RuntimeError(f"never true: {script}")
            time.sleep(0.3)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, element: str, frame: str) -> None:
        """Click the middle of an element (a JavaScript expression) inside a frame."""
        x, y, left, top = self.run(
            f"(() => {{ const a = {element}.getBoundingClientRect(), b = {frame}.getBoundingClientRect(); "
            "return [a.x + a.width / 2, a.y + a.height / 2, b.x, b.y]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x + left, y + top, button="left", clickCount=1)

    def key(self, letter: str, times: int) -> None:
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                code = {"key": letter, "code": f"Key{letter.upper()}", "windowsVirtualKeyCode": ord(letter.upper())}
                text = {"text": letter} if kind == "keyDown" else {}
                self.ask("Input.dispatchKeyEvent", type=kind, **code, **text)
            time.sleep(0.2)

    def photograph(self, path: Path) -> None:
        data = self.ask("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
        print(f"{path}: {path.stat().st_size} bytes")


PLUGIN = "document.querySelector('iframe').contentDocument"


TRACE = """(function holds(node) {
    if (node.nodeType === 3) return node.data.includes("kind of layer");
    return [...node.childNodes, node.shadowRoot, node.tagName === "IFRAME" && node.contentDocument].some(part => part && holds(part));
})(document)"""
"""Whether the trace viewer shows a trace of ours."""

TOOLS = 1  # place of the list among the plugin's


def choose(browser: Browser, text: str) -> None:
    """Pick the entry that begins with `text` in the plugin's list of tools."""
    trigger = f"{PLUGIN}.querySelectorAll('.mat-mdc-select-trigger')[{TOOLS}]"
    option = f"[...{PLUGIN}.querySelectorAll('mat-option')].find(o => o.textContent.trim().startsWith('{text}'))"
    for _ in range(20):  # a list that is still being filled does not open
        browser.until(f"!!{trigger}")
        browser.click(trigger, "document.querySelector('iframe')")
        time.sleep(3)
        if browser.run(f"!!{option}"):
            break
    else:
        there = browser.run(f"[...{PLUGIN}.querySelectorAll('mat-option')].map(o => o.textContent.trim())")
        raise SystemExit(f"no {text} among {there}")
    browser.run(f"{option}.click()")
    time.sleep(8)


def opened(browser: Browser, address: str) -> None:
    """The plugin's first page, freshly loaded."""
    browser.ask("Page.navigate", url="about:blank")
    browser.ask("Page.navigate", url=f"{address}/#profile")
    browser.until(f"!!{PLUGIN} && {PLUGIN}.body.textContent.includes('Average Step Time')")
    time.sleep(3)


def clicked(browser: Browser, x: float, y: float) -> None:
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.mouse(kind, x, y, button="none" if kind == "mouseMoved" else "left", clickCount=1)


def zoomed(browser: Browser, place: tuple[float, float], strokes: int) -> None:
    """Zoom the trace viewer in where the mouse is; a click gives it the keyboard."""
    clicked(browser, *place)
    browser.key("w", strokes)
    time.sleep(8)


def photographs(browser: Browser, address: str, out: Path) -> None:
    opened(browser, address)
    choose(browser, "Trace Viewer")
    browser.until(TRACE, 180)
    time.sleep(5)
    zoomed(browser, STEP, STROKES)
    browser.photograph(out / "trace_viewer.png")
    zoomed(browser, LAYER, MORE)
    clicked(browser, *SELECTED)
    browser.mouse("mouseMoved", SELECTED[0], 780, button="none")
    time.sleep(2)
    browser.photograph(out / "trace_viewer_zoomed.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(options.runs),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for _ in range(120):
            try:
                if json.loads(opener.open(f"{address}/data/plugins_listing").read())["profile"]["enabled"]:
                    break
            except OSError:
                pass
            time.sleep(0.5)
        browser = Browser(profile)
        try:
            photographs(browser, address, options.out)
        finally:
            browser.process.terminate()
            browser.process.wait()
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
