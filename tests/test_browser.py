"""The report's page in headless Chromium, driven over the DevTools pipe: no package is needed beside the browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cce_precision.analysis import report
from tests.test_report import made_up_table

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
os.dup2(ends[0], 3)  # the browser reads commands from 3 ...
os.dup2(ends[1], 4)  # ... and answers on 4
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE = 60  # seconds until a browser that says nothing is given up


class Browser:
    """A headless browser with one tab: `call` sends a DevTools command, `evaluate` runs an expression in the page."""

    def __init__(self, binary: str, profile: Path) -> None:
        to_read, self.out = os.pipe()
        self.into, to_write = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(to_read), str(to_write), binary, *FLAGS]
        command += [f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command,
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        os.set_blocking(self.into, False)
        self.pending, self.count, self.session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.pending:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise TimeoutError("the browser does not answer")
            try:
                self.pending += os.read(self.into, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        text, _, self.pending = self.pending.partition(b"\0")
        return json.loads(text)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        command = {"id": self.count, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        payload = json.dumps(command).encode() + b"\0"
        os.write(self.out, payload)
        deadline = time.monotonic() + PATIENCE
        while True:
            message = self._message(deadline)
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str) -> None:
        """Waits until the expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"still not: {expression}"
            time.sleep(0.05)

    def open(self, page: Path, width: int = 1400, height: int = 1000) -> None:
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.until("document.readyState === 'complete'")

    def click(self, selector: str) -> None:
        """A click as from a mouse, in the middle of the first element that matches."""
        script = f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
        script += "e.scrollIntoView({block: 'center'});"
        script += " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        x, y = self.evaluate(script)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            buttons = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **buttons)

    def complaints(self) -> list[str]:
        """Errors and warnings on the console, uncaught exceptions, requests for anything but the page's own file."""
        self.evaluate("1")
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown" or (
                method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning")
            ):
                found.append(json.dumps(params))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
                ("file:", "data:", "blob:")
            ):
                found.append(params["request"]["url"])
        return found

    def close(self) -> None:
        os.close(self.out)
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self.into)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(BROWSERS)})")
    opened = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.build(made_up_table(), tmp_path_factory.mktemp("page"))


def first_figure(expression: str) -> str:
    return f"(d => {expression})(document.querySelector('.live[data-figure=error]'))"


READY = first_figure("d.dataset.ready === 'yes' && d.querySelectorAll('.legendtoggle').length > 1")
HIDDEN = first_figure("d.data.filter(t => t.visible === 'legendonly').map(t => t.name)")


def test_the_page_loads_without_complaint_and_loads_nothing(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.until(READY)
    assert browser.complaints() == []
    assert browser.evaluate("[...document.querySelectorAll('.live')].every(d => d.dataset.ready === 'yes')")
    assert browser.evaluate("getComputedStyle(document.querySelector('img.static')).display") == "none"


def test_the_threshold_plot_reacts_to_a_legend_click(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.until(READY)
    assert browser.evaluate(HIDDEN) == []
    name = browser.evaluate(first_figure("d.querySelector('.legendtext').textContent"))
    browser.click(".live[data-figure=error] .legendtoggle")
    browser.until(f"{HIDDEN}.length > 0")
    assert set(browser.evaluate(HIDDEN)) == {name}
    browser.click("#views button:nth-of-type(2)")  # what is hidden stays hidden in another view
    browser.until(f"{HIDDEN}.includes({json.dumps(name)})")
    browser.click(".live[data-figure=error] .legendtoggle")
    browser.until(f"{HIDDEN}.length === 0")
    assert browser.complaints() == []


def test_the_scale_is_switched(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.until(READY)
    kind: Callable[[], str] = lambda: browser.evaluate(first_figure("d._fullLayout.yaxis.type"))  # noqa: E731
    assert kind() == "log"
    browser.click("#scales button:nth-of-type(2)")
    browser.until(first_figure("d._fullLayout.yaxis.type === 'linear'"))
    browser.click("#scales button:nth-of-type(1)")
    browser.until(first_figure("d._fullLayout.yaxis.type === 'log'"))
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_sticks_out_of_the_window(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    browser.until(READY)
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_without_scripts_the_pictures_stand(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.events.clear()
        browser.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + PATIENCE
        while not any(e.get("method") == "Page.loadEventFired" for e in browser.events):
            assert time.monotonic() < deadline
            browser.call("Page.getLayoutMetrics")
            time.sleep(0.05)
        document = browser.call("DOM.getDocument")["root"]["nodeId"]
        images = browser.call("DOM.querySelectorAll", nodeId=document, selector="img.static")["nodeIds"]
        boxes = [browser.call("DOM.getBoxModel", nodeId=image)["model"] for image in images]
        assert len(boxes) >= 4 and all(box["width"] > 0 and box["height"] > 0 for box in boxes)
        assert browser.complaints() == []
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
