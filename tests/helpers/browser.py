"""A real browser, driven through the two pipes that Chromium's debugging protocol can take in place of a port."""

import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-sync")
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9}


def find_browser():
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One window.

    Args:
        program: Path of the browser.
        profile: An empty folder for what it writes.
    """

    def __init__(self, program, profile):
        orders, self.write_to = os.pipe()
        self.read_from, answers = os.pipe()
        command = [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        # The browser reads orders from number 3 and answers on number 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{orders} 4>&{answers}', "browser", *command]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(shell, pass_fds=(orders, answers), **quiet)
        os.close(orders)
        os.close(answers)
        self.buffer, self.number, self.session = b"", 0, None
        self.errors, self.requests = [], []
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """Give an order and return its answer; what is reported meanwhile is kept."""
        self.number += 1
        order = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            order["sessionId"] = self.session
        os.write(self.write_to, json.dumps(order).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self.number:
                assert "error" not in told, told
                return told["result"]
            self._keep(told)

    def _next(self):
        while b"\0" not in self.buffer:
            read = os.read(self.read_from, 1 << 16)
            assert read, "the browser ended"
            self.buffer += read
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _keep(self, told):
        params = told.get("params", {})
        if told.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["exception"].get("description", "an exception"))
        elif told.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(f"{params['type']}: {params['args']}")
        elif told.get("method") == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif told.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, address, width=1200, height=900):
        """Show an address and wait until its scripts have run."""
        self.errors.clear()
        self.requests.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=address)
        deadline = time.monotonic() + 30
        while self.js("document.readyState + location.href.slice(0, 5)") in {"completeabout", "loadingabout"} or (
            self.js("document.readyState") != "complete"
        ):
            assert time.monotonic() < deadline, f"{address} did not load"
            time.sleep(0.02)

    def js(self, expression):
        """Return the value of an expression in the page."""
        told = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def press(self, key):
        """Press and let go of a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def close(self):
        """End the browser."""
        self.session = None
        with suppress(AssertionError, OSError):  # it may be gone before it answers
            self("Browser.close")
        self.process.wait(timeout=20)
        os.close(self.write_to)
        os.close(self.read_from)


def address_of(path, fragment=""):
    """Return the address of a file."""
    return Path(path).resolve().as_uri() + fragment
