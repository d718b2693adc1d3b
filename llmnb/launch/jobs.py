"""Ray's Jobs API at a URL, over plain HTTP: packages, submit, ask, stop.

It spares a notebook's kernel the import of Ray (2 s and 100 MB). No secret goes into an entrypoint, an environment
variable or metadata, which everyone who may see the cluster can read.

Sources: https://docs.ray.io/en/latest/cluster/running-applications/job-submission/rest.html; for packages, what
``ray.job_submission.JobSubmissionClient`` sends for a ``working_dir``.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import LaunchError

__all__ = ["ENDED", "Jobs", "at", "token"]

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_REFUSED = (401, 403)


def token() -> str:
    """The token for clusters that ask for one, found where Ray's own clients find it; "" when there is none.

    Source: https://docs.ray.io/en/latest/ray-security/token-auth.html
    """
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return ""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    with contextlib.suppress(OSError):
        return path.read_text(encoding="ascii").strip()
    return ""


def at(url: str) -> Jobs:
    """The Jobs API at a URL, with the token that this process has for clusters."""
    return Jobs(url, token())


class Jobs:
    """The Jobs API at a URL.

    Args:
        url: of the dashboard, ``http://127.0.0.1:8265``.
        token: for ``Authorization``; hidden from repr.
    """

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url.rstrip("/")
        self._token = token
        here = urlsplit(self.url).hostname in LOOPBACK  # then never through a proxy
        proxies = [urllib.request.ProxyHandler({})] if here else []
        self._open = urllib.request.build_opener(*proxies).open

    def __repr__(self) -> str:
        return f"Jobs({self.url!r})"

    def _ask(
        self, path: str, body: Mapping[str, Any] | bytes | None = None, *, method: str = "GET", timeout: float = 30
    ) -> Any:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": kind}, method=method)
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        with self._open(request, timeout=timeout) as answer:
            text = answer.read().decode("utf-8", "replace")
        return json.loads(text) if text else None

    # -- is it there -----------------------------------------------------------------------------------------

    def prove(self) -> None:
        """Asks whether it would take a job from us.

        Raises:
            LaunchError: nobody answers, it is no Ray cluster, or it does not take our token.
        """
        try:
            version = self._ask("/api/version", timeout=10)
            self._ask("/api/jobs/", timeout=20)
        except urllib.error.HTTPError as error:
            if error.code in _REFUSED:
                have = "it does not take the token it was given" if self._token else "there is no token here"
                raise LaunchError(
                    f"The Ray cluster at {self.url} asks for a token.",
                    seen=f"HTTP {error.code}; {have}",
                    todo="export RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH with the file that holds it",
                ) from None
            raise LaunchError(f"{self.url} is not a Ray cluster's dashboard.", seen=f"HTTP {error.code}") from None
        except OSError as error:
            raise LaunchError(
                f"Nobody answers at {self.url}.",
                seen=str(getattr(error, "reason", error)),
                todo="check ray_address; the head must be started with a dashboard that this machine reaches "
                "(`ray start --head --dashboard-host=0.0.0.0`), or its port be forwarded",
            ) from None
        except ValueError:
            version = None
        if not isinstance(version, Mapping) or "ray_version" not in version:
            raise LaunchError(f"{self.url} is not a Ray cluster's dashboard.", todo="give http://host:8265")

    def gpus(self) -> int:
        """GPUs of all nodes; 0 when it does not say."""
        try:
            nodes = self._ask("/api/v0/nodes?detail=1", timeout=10)["data"]["result"]["result"]
            return int(sum((node.get("resources_total") or {}).get("GPU", 0) for node in nodes))
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    # -- packages --------------------------------------------------------------------------------------------

    def put_package(self, name: str, content: bytes) -> None:
        """Stores a zip in the cluster under a name, instead of what was there. Ray drops it when no job names it.

        Raises:
            LaunchError: the cluster does not take it.
        """
        try:
            self._ask(f"/api/packages/gcs/{name}", content, method="PUT", timeout=300)
        except (OSError, ValueError) as error:
            told = error.read().decode("utf-8", "replace") if isinstance(error, urllib.error.HTTPError) else str(error)
            raise LaunchError("Ray does not take the job's parcel.", seen=told[-600:]) from None

    # -- jobs ------------------------------------------------------------------------------------------------

    def submit(
        self, entrypoint: str, *, id: str, cpus: float, gpus: float, metadata: Mapping[str, str], package: str = ""
    ) -> str:
        """Submits a command line under an id of ours; giving the same id twice submits once.

        Args:
            entrypoint: the command line.
            id: of the job.
            cpus: that it takes.
            gpus: that it takes.
            metadata: shown with the job.
            package: a stored package; its content is the job's working directory.

        Raises:
            LaunchError: the cluster refuses, or does not answer within a minute.
        """
        body: dict[str, Any] = {"entrypoint": entrypoint, "submission_id": id, "metadata": dict(metadata)}
        if package:
            body["runtime_env"] = {"working_dir": f"gcs://{package}"}
        if cpus:
            body["entrypoint_num_cpus"] = cpus
        if gpus:
            body["entrypoint_num_gpus"] = gpus
        end, seen = time.monotonic() + 60, ""
        while time.monotonic() < end:
            try:
                self._ask("/api/jobs/", body, method="POST", timeout=60)
                return id
            except urllib.error.HTTPError as error:
                seen = error.read().decode("utf-8", "replace")[:600]
                if "already exists" in seen:
                    return id
                if error.code < 500:
                    break
            except OSError as error:
                seen = str(error)
            time.sleep(0.5)  # a fresh cluster's agent needs a moment
        raise LaunchError("Ray does not take the job.", seen=seen, todo="see the cluster's dashboard, then try again")

    def info(self, id: str) -> dict[str, Any] | None:
        """What Ray says of a job (``status``, ``message``, …); None when it knows none, or does not answer."""
        try:
            return self._ask(f"/api/jobs/{id}", timeout=10)
        except (OSError, ValueError):
            return None

    def logs(self, id: str) -> str:
        """What the job's command printed."""
        try:
            return str(self._ask(f"/api/jobs/{id}/logs").get("logs", ""))
        except (OSError, ValueError):
            return ""

    def stop(self, id: str) -> None:
        """Asks Ray to end a job: SIGTERM, later SIGKILL."""
        try:
            self._ask(f"/api/jobs/{id}/stop", method="POST")
        except (OSError, ValueError):
            return
