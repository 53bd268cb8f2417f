"""A headless Chromium, spoken to in the DevTools protocol over a pipe, and the pixels of what it draws."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find():
    """Return the path of a Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Chromium:
    """One tab of a browser; a context manager."""

    def __enter__(self):
        self._profile = tempfile.mkdtemp()
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()

        def as_3_and_4():  # where Chromium reads and writes
            kept = os.dup(read_commands), os.dup(write_answers)
            os.dup2(kept[0], 3)
            os.dup2(kept[1], 4)

        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        self._process = subprocess.Popen(
            [find(), *arguments, f"--user-data-dir={self._profile}", "--remote-debugging-pipe", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=as_3_and_4,
        )  # fmt: skip
        os.close(read_commands)
        os.close(write_answers)
        self._left, self._number, self._session = b"", 0, None
        (page,) = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        self("Page.enable")
        return self

    def __exit__(self, *raised):
        os.close(self._commands)
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._answers)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _next(self):
        while b"\0" not in self._left:
            got = os.read(self._answers, 1 << 20)
            assert got, f"Chromium ended with {self._process.wait(timeout=30)}"
            self._left += got
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def __call__(self, method, **parameters):
        """Call a method of the protocol; return its result."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._commands, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, (method, told["error"])
                return told["result"]

    def open(self, path, width, height, dark, mobile):
        """Show a file on a screen of this size, light or dark."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=Path(path).absolute().as_uri())
        self.run("new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', done))")

    def run(self, script):
        """Return what an expression gives in the page."""
        done = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def screenshot(self):
        """(height, width, 3), uint8: the whole page."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self(
            "Page.captureScreenshot", format="png", optimizeForSpeed=True, captureBeyondViewport=True, clip=clip
        )
        return pixels(base64.b64decode(shot["data"]))


def pixels(png):
    """Decode a PNG as `screenshot` asks for it: (height, width, 3), uint8."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed, head = 8, b"", b""
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        data = png[at + 8 : at + 8 + length]
        head, packed = (data, packed) if kind == b"IHDR" else (head, packed + data * (kind == b"IDAT"))
        at += 12 + length
    width, height = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big")
    channels = {2: 3, 6: 4}[head[9]]
    assert (head[8], head[12]) == (8, 0)  # bits a channel, not interlaced
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    out = rows[:, 1:].reshape(height, width, channels).copy()
    for y in range(height):  # sums of bytes wrap, as the format has it
        filtered = rows[y, 0]
        assert filtered <= 2, "a filter that is slow to undo"
        if filtered == 1:
            out[y] = np.cumsum(out[y], axis=0, dtype=np.uint8)
        elif filtered == 2 and y:
            out[y] += out[y - 1]
    return out[:, :, :3]
