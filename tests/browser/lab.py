"""JupyterLab in headless Chromium, as one object: start it, open a notebook, run cells, look, take pictures.

Everything it starts lives in a folder of its own and is ended by its process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    (p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if Path(p).exists()), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What has the focus, what the page tells the person, and whether the kernel is there.
_SHOWN = """() => {
    const at = document.activeElement, kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
    const told = [...document.querySelectorAll('[role=status], [role=alert], .llmnb-fault')].map((e) => e.textContent);
    const focus = `${at.tagName} ${at.className} ${at.getAttribute('aria-label') || ''}`;
    return JSON.stringify({focus, kernel: [kernel?.connectionStatus, kernel?.status], told: told.filter((t) => t)});
}"""
_OVERRIDES = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none", "autoStartDefaultKernel": True},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a Jupyter of its own: nothing of the person's settings is read or written."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "LLMNB", "IPYTHON"))}
    for name in ("CONFIG", "DATA", "RUNTIME"):
        (folder / name.lower()).mkdir(parents=True, exist_ok=True)
        env[f"JUPYTER_{name}_DIR"] = str(folder / name.lower())
    env["IPYTHONDIR"] = str(folder / "ipython")
    env["JUPYTERLAB_SETTINGS_DIR"] = str(folder / "settings")
    env["JUPYTERLAB_WORKSPACES_DIR"] = str(folder / "workspaces")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    return {**env, **more}


def notebook(*cells: str) -> Any:
    """A notebook of code cells."""
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(text) for text in cells]
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return book


def _settings(folder: Path, theme: str) -> None:
    values = {**_OVERRIDES, "@jupyterlab/apputils-extension:themes": {"theme": theme}}
    for name, value in values.items():
        package, _, plugin = name.partition(":")
        target = folder / "settings" / package / f"{plugin}.jupyterlab-settings"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(value))


class Lab:
    """A running JupyterLab and one page of it.

    Args:
        driver: a started playwright; one serves all Labs of a process.
        folder: where everything lives; notebooks lie in ``folder / "work"``.
        theme: "JupyterLab Light" or "JupyterLab Dark".
        width: of the window, pixels.
    """

    def __init__(
        self, driver: Any, folder: Path, theme: str = "JupyterLab Light", width: int = 1300, **env: str
    ) -> None:
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        _settings(folder, theme)
        self.port, self.token = free_port(), os.urandom(16).hex()
        self._log = open(folder / "lab.log", "wb")  # noqa: SIM115 - closed in close()
        self.server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                f"--ServerApp.port={self.port}",
                "--ServerApp.port_retries=0",
                "--ServerApp.ip=127.0.0.1",
                f"--IdentityProvider.token={self.token}",
                f"--ServerApp.root_dir={self.work}",
                "--ServerApp.allow_root=True",
                "--LabApp.expose_app_in_browser=True",
                "--LabApp.extension_manager=readonly",
            ],
            env=environment(folder, **env),
            cwd=self.work,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self._wait_for_server()
            self.browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            self.page = self.browser.new_page(viewport={"width": width, "height": 1000})
            self.said: list[str] = []
            self.page.on("console", lambda m: self.said.append(f"{m.type}: {m.text}") if m.type == "error" else None)
            self.page.on("pageerror", lambda e: self.said.append(f"uncaught: {e}"))
        except BaseException:
            self.close()
            raise

    def _wait_for_server(self, patience: float = 90) -> None:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if self.server.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.2)
        raise RuntimeError("JupyterLab did not start:\n" + (self.folder / "lab.log").read_text()[-3000:])

    # -- the page --------------------------------------------------------------------------------------------

    def open(self, name: str, book: Any = None, *, kernel: bool = True) -> None:
        """Opens a notebook (written first when given) in a new workspace and waits for its idle kernel."""
        if book is not None:
            nbformat.write(book, self.work / name)
        workspace = f"w{time.time_ns()}"
        self.page.goto(f"http://127.0.0.1:{self.port}/lab/workspaces/{workspace}/tree/{name}?token={self.token}")
        self.page.wait_for_selector(".jp-Notebook", timeout=90_000)
        if kernel:
            self.idle()

    def idle(self, patience: float = 120) -> None:
        """Waits until the kernel is connected and has nothing to do."""
        self.page.wait_for_function(
            """() => {
                const app = window.jupyterapp; const panel = app && app.shell.currentWidget;
                const kernel = panel?.sessionContext?.session?.kernel;
                return kernel && kernel.connectionStatus === 'connected' && kernel.status === 'idle';
            }""",
            timeout=patience * 1000,
        )

    def run(self, cell: int, *, wait: bool = True, patience: float = 240) -> None:
        """Runs one cell by its index."""
        self.page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".cm-content").first.click()
        self.page.keyboard.press("Control+Enter")
        if wait:
            self.page.wait_for_timeout(300)
            self.idle(patience)

    def set_theme(self, name: str) -> None:
        """Switches the theme as the menu does."""
        self.page.evaluate("(name) => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)

    def save(self) -> None:
        """Saves the notebook."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        self.page.wait_for_timeout(1000)

    def shut_kernel(self) -> None:
        """Shuts the notebook's kernel down."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")

    def output(self, cell: int) -> Any:
        """The output area of a cell."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-Cell-outputArea")

    def attribute(self, name: str, where: str = "[data-points]") -> str | None:
        """An attribute of the first chart, or None while there is none."""
        found = self.page.locator(where)
        return found.first.get_attribute(name) if found.count() else None

    def until(self, script: str, patience: float = 60, arg: Any = None) -> None:
        """Waits until a JavaScript expression is true; else an AssertionError says what the page shows instead."""
        from playwright.sync_api import TimeoutError as Late

        try:
            self.page.wait_for_function(script, arg=arg, timeout=patience * 1000)
        except Late:
            shown = self.page.evaluate(_SHOWN)
            raise AssertionError(f"not within {patience:g} s: {script} of {arg!r}; the page shows {shown}") from None

    def picture(self, path: Path) -> Path:
        """A screenshot of the page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path))
        return path

    def faults(self) -> list[str]:
        """Errors of the page that speak of our code."""
        return [line for line in self.said if re.search(r"llmnb|anywidget|uPlot|blob:", line)]

    def close(self) -> None:
        """Ends browser, server and kernels."""
        if hasattr(self, "browser"):
            self.browser.close()
        if self.server.poll() is None:
            self.server.terminate()  # the server shuts its kernels down
            try:
                self.server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.server.pid, signal.SIGKILL)
                self.server.wait(timeout=10)
        self._log.close()


@contextlib.contextmanager
def lab(driver: Any, folder: Path, **options: Any) -> Iterator[Lab]:
    """A Lab that is closed at the end. What it showed when something went wrong is kept beside its folder."""
    found = Lab(driver, folder, **options)
    try:
        yield found
    except Exception:
        with contextlib.suppress(Exception):
            found.picture(folder.with_name(f"{folder.name}-failed.png"))
        raise
    finally:
        found.close()
