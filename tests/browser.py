"""A headless Chromium, driven over a pipe by the DevTools protocol: https://chromedevtools.github.io/devtools-protocol."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}  # key: its code, and the text that it types


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One page in a browser of its own, which finds no host. `events` holds what it reported, oldest first."""

    def __init__(self, program: str, seconds: float = 60.0) -> None:
        self.seconds, self.events, self._session, self._sent, self._unread = seconds, list[dict[str, Any]](), "", 0, b""
        self._profile = tempfile.mkdtemp(prefix="chromium.")
        reads, self._write = map(_above_ten, os.pipe())
        self._read, writes = map(_above_ten, os.pipe())

        def give_pipes() -> None:  # Chromium reads commands from 3 and writes to 4
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        self._process = subprocess.Popen(
            [
                program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
                f"--user-data-dir={self._profile}", "about:blank",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            close_fds=False, preexec_fn=give_pipes, start_new_session=True,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """All of its processes end, and nothing of it stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result; events that come before it are kept. Raises RuntimeError where the command fails."""
        self._sent += 1
        command = {"id": self._sent, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + self.seconds
        while (message := self._message(deadline)).get("id") != self._sent:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return dict(message["result"])

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium did not answer within {self.seconds:g} s")
            if not (some := os.read(self._read, 1 << 16)):
                raise RuntimeError("Chromium has ended")
            self._unread += some
        line, self._unread = self._unread.split(b"\0", 1)
        return dict(json.loads(line))

    def reported(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all events of a kind so far."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def open(self, file: Path) -> None:
        """Load a file anew, with no memory of what was there."""
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON; promises are awaited. Raises RuntimeError where it throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        deadline = time.monotonic() + self.seconds
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {self.seconds:g} s: {condition}")
            time.sleep(0.02)

    def move(self, x: float, y: float) -> None:
        """The mouse goes there, in CSS pixels of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        """Its left button is pressed and released there."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        code, text = KEYS[key]
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def resize(self, width: int, height: int = 900) -> None:
        """The window, in CSS pixels; 0 by 0 is the browser's own size again."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, file: Path) -> None:
        """All of the page, also what lies below the window."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


def _above_ten(descriptor: int) -> int:
    """The same pipe, where handing out 3 and 4 cannot overwrite it."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
