"""Photograph the top of a `moejax report`, for docs/report.md. Needs Chromium.

python docs/photograph_report.py FILE.html docs/report.png
"""

import argparse
import base64
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from docs.make_screenshots import Browser

HEIGHT = 1400
PANES = ((760, "light", None), (390, "light", "#stages"), (390, "dark", "#throughput"))  # width, scheme, what stands at the top


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    pictures = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            for width, scheme, top in PANES:
                browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT, deviceScaleFactor=1, mobile=top is not None)
                browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                browser.ask("Page.navigate", url=options.page.resolve().as_uri())
                browser.until("document.readyState == 'complete'")
                if top:
                    browser.run(f"document.querySelector('{top}').scrollIntoView()")
                pictures.append(base64.b64decode(browser.ask("Page.captureScreenshot", format="png")["data"]))
        finally:
            browser.process.terminate()
            browser.process.wait()
    options.out.write_bytes(_beside(pictures))
    print(f"{options.out}: {options.out.stat().st_size} bytes")


def _beside(pictures: list[bytes]) -> bytes:
    """One PNG of several of the same height."""
    import io

    from PIL import Image

    images = [Image.open(io.BytesIO(p)).convert("RGB") for p in pictures]
    gap = 20
    whole = Image.new("RGB", (sum(i.width for i in images) + gap * (len(images) - 1), max(i.height for i in images)), "#9aa4b0")
    x = 0
    for image in images:
        whole.paste(image, (x, 0))
        x += image.width + gap
    out = io.BytesIO()
    whole.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    main()
