"""A real Chromium, driven over its DevTools protocol: what people see, with no more than a socket in between."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--remote-debugging-port=0", "--remote-allow-origins=*", "--mute-audio", "--disable-default-apps"),
)


def chromium() -> str | None:
    """The program, where there is one; `make browser` installs it."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


class Browser:
    """One tab.

    Attributes:
        complaints: What the browser's console has said: errors, exceptions, and breaches of the content policy.
        requested: Every URL that it has asked for.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._do(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is there."""
        self._do("Page.navigate", url=url)
        wait_until(lambda: self.run("document.readyState === 'complete' && location.href !== 'about:blank'"))

    def run(self, script: str) -> Any:
        """What an expression gives in the page; None while the page changes."""
        answer = self._do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return answer.get("result", {}).get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true in the page."""
        return wait_until(lambda: self.run(f"Boolean({script})"), shows=lambda: self.run("document.body.innerText"))

    def text(self) -> str:
        """What the page says."""
        return str(self.run("document.body.innerText"))

    def click(self, selector: str) -> None:
        """Click on the middle of an element, as a mouse does."""
        box = self.run(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)}); if (!found) return null;"
            "found.scrollIntoView({block: 'center'}); const box = found.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        assert box, f"there is no {selector} on this page:\n{self.text()}"
        for kind in ("mousePressed", "mouseReleased"):
            self._do("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, *keys: str) -> None:
        """Press keys one after the other: letters, or names such as Enter."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        for key in keys:
            text = "\r" if key == "Enter" else key if len(key) == 1 else ""
            common = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
            self._do("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
            self._do("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self._do("Input.insertText", text=text)

    def look(self, *, width: int = 1280, height: int = 860, dark: bool = False) -> None:
        """Have a window of another size, and light or dark."""
        self._do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._do("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Keep what the window shows as a PNG."""
        answer = self._do("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    def cookies(self) -> list[dict[str, Any]]:
        """The cookies that it keeps."""
        found: list[dict[str, Any]] = self._do("Network.getAllCookies")["cookies"]
        return found

    def forget(self) -> None:
        """Have no cookies any more."""
        self._do("Network.clearBrowserCookies")

    def _do(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=patience(LIMIT_S)))
            if message.get("id") == number:
                assert "error" not in message or method == "Runtime.evaluate", message
                result: dict[str, Any] = message.get("result", {})
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])


@contextmanager
def browser() -> Iterator[Browser]:
    """Runs a Chromium with a profile of its own; it has one tab."""
    program = chromium()
    assert program is not None
    profile = Path(tempfile.mkdtemp(prefix="qs-browser-"))
    process = subprocess.Popen(
        [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        where = profile / "DevToolsActivePort"
        wait_until(lambda: where.exists() and len(where.read_text().splitlines()) == 2)
        port = where.read_text().splitlines()[0]
        with connect(_tab(port), max_size=None, open_timeout=patience(LIMIT_S)) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(patience(LIMIT_S))
        shutil.rmtree(profile, ignore_errors=True)


def _tab(port: str) -> str:
    import httpx

    def find() -> str:
        tabs = httpx.get(f"http://127.0.0.1:{port}/json", timeout=patience(LIMIT_S)).json()
        return next((str(tab["webSocketDebuggerUrl"]) for tab in tabs if tab["type"] == "page"), "")

    return wait_until(find)
