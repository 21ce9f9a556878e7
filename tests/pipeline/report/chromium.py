"""A headless Chromium over its debugging pipe; needs nothing but the standard library."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--remote-debugging-pipe",
)
TIMEOUT_SECONDS = 60.0


def find() -> str | None:
    """Return the browser's path, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """Sends commands and collects events of one page."""

    def __init__(self, write_to: int, read_from: int) -> None:
        self._write_to, self._read_from = write_to, read_from
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def open(self, url: str, *, dark: bool, width: int, paper: bool = False) -> None:
        """Open a page and wait until it is loaded.

        Args:
            url: Of the page.
            dark: Whether the system's theme is dark.
            width: Of the window, pixels.
            paper: Whether the page is shown as it is printed.
        """
        if self._session is None:
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        media = "print" if paper else "screen"
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression (promises are waited for)."""
        found = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and let go a key, by its name: Tab, Enter, ArrowRight .."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}
        facts: dict[str, Any] = {
            "key": key,
            "code": "Space" if key == " " else key,
            "windowsVirtualKeyCode": codes[key],
        }
        text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **facts, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **facts)

    def focus(self, selector: str) -> None:
        """Move the focus to an element."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus(), 0")

    def complaints(self) -> list[str]:
        """Return what the console would show of warnings and errors."""
        found = []
        for event in self.events:
            detail = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(detail["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                if detail["type"] in ("error", "warning", "assert"):
                    found.append(str(detail["args"]))
            elif event["method"] == "Log.entryAdded":
                found.append(f"{detail['entry']['level']}: {detail['entry']['text']}")
        return found

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for, data URIs left out."""
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in sent]
        return [url for url in urls if not url.startswith("data:")]

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while b"\0" not in self._rest:
            waiting = select.poll()  # takes descriptors above 1023, which select() does not
            waiting.register(self._read_from, select.POLLIN)
            left = max(0.0, deadline - time.monotonic())
            assert waiting.poll(1000 * left), "the browser does not answer"
            data = os.read(self._read_from, 1 << 20)
            assert data, "the browser ended"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


@contextlib.contextmanager
def start(profile: Path) -> Iterator[Browser]:
    """Start the browser with a profile of its own; end it afterwards."""
    program = find()
    assert program is not None
    pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for pair in (os.pipe(), os.pipe()) for end in pair]
    its_input, our_output, our_input, its_output = pipes

    def wire() -> None:
        os.dup2(its_input, 3)
        os.dup2(its_output, 4)

    command = [program, *SWITCHES, f"--user-data-dir={profile}", "about:blank"]
    with (profile.parent / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            preexec_fn=wire,
            pass_fds=(3, 4),
            start_new_session=True,
        )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Browser(our_output, our_input)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        os.close(our_output)
        os.close(our_input)
