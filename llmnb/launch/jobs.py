"""Ray's Jobs API: submit, ask, stop.

Our own cluster is spoken to over HTTP
(https://docs.ray.io/en/latest/cluster/running-applications/job-submission/rest.html), which spares a notebook's kernel
the import of Ray; any other cluster is reached through Ray's own client, which knows ``ray://`` and ``host:port``
addresses. No secret goes into an entrypoint, an environment variable or metadata.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from ..errors import LaunchError, MissingPackage

__all__ = ["Jobs", "RayJobs"]

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Jobs:
    """The Jobs API at a URL.

    Args:
        url: of the dashboard, ``http://127.0.0.1:8265``.
        token: for ``Authorization``; hidden from repr.
    """

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url.rstrip("/")
        self._token = token
        # Never through a proxy: the cluster is on loopback.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def __repr__(self) -> str:
        return f"Jobs({self.url!r})"

    def _ask(self, path: str, body: Mapping[str, Any] | None = None, *, post: bool = False, timeout: float = 30) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode() if body is not None else (b"" if post else None),
            headers={"Content-Type": "application/json"},
            method="POST" if post else "GET",
        )
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        with self._open(request, timeout=timeout) as answer:
            text = answer.read().decode("utf-8", "replace")
        return json.loads(text) if text else None

    def answers(self) -> bool:
        """True when somebody who takes our token listens there."""
        try:
            self._ask("/api/version", timeout=5)
        except (OSError, ValueError):
            return False
        return True

    def submit(self, entrypoint: str, *, id: str, cpus: float, gpus: float, metadata: Mapping[str, str]) -> str:
        """Submits a command line under an id of ours; giving the same id twice submits once.

        Raises:
            LaunchError: the cluster refuses, or does not answer within a minute.
        """
        body: dict[str, Any] = {"entrypoint": entrypoint, "submission_id": id, "metadata": dict(metadata)}
        if cpus:
            body["entrypoint_num_cpus"] = cpus
        if gpus:
            body["entrypoint_num_gpus"] = gpus
        end, seen = time.monotonic() + 60, ""
        while time.monotonic() < end:
            try:
                self._ask("/api/jobs/", body, post=True, timeout=60)
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
        raise LaunchError("Ray does not take the job.", seen=seen, todo="llmnb ray stop, then try again")

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
            self._ask(f"/api/jobs/{id}/stop", post=True)
        except (OSError, ValueError):
            return


class RayJobs:
    """The same, for a cluster that is not ours, through Ray's own client.

    Args:
        address: ``auto``, ``host:6379``, ``ray://host:10001`` or ``http://host:8265``.

    Raises:
        LaunchError: nobody answers there.
        MissingPackage: Ray is not installed.
    """

    def __init__(self, address: str) -> None:
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise MissingPackage("ray", "ray", "Training on a Ray cluster") from error
        self.url = address
        try:
            self._client = JobSubmissionClient(address)
        except Exception as error:  # noqa: BLE001 - a border: Ray raises many kinds here
            raise LaunchError(
                f"The Ray cluster at {address} cannot be reached.",
                seen=f"{type(error).__name__}: {error}"[:600],
                todo="check ray_address, and RAY_AUTH_TOKEN_PATH when the cluster asks for a token",
            ) from None

    def answers(self) -> bool:
        """True: the client asked when it was made."""
        return True

    def submit(self, entrypoint: str, *, id: str, cpus: float, gpus: float, metadata: Mapping[str, str]) -> str:
        """Submits a command line under an id of ours."""
        try:
            return str(
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=id,
                    metadata=dict(metadata),
                    entrypoint_num_cpus=cpus or None,
                    entrypoint_num_gpus=gpus or None,
                )
            )
        except Exception as error:  # noqa: BLE001 - as above
            raise LaunchError("Ray does not take the job.", seen=f"{type(error).__name__}: {error}"[:600]) from None

    def info(self, id: str) -> dict[str, Any] | None:
        """What Ray says of a job, or None."""
        try:
            details = self._client.get_job_info(id)
        except Exception:  # noqa: BLE001 - as above: whatever went wrong, there is nothing to tell
            return None
        return {"status": str(details.status.value), "message": details.message or ""}

    def logs(self, id: str) -> str:
        """What the job's command printed."""
        try:
            return str(self._client.get_job_logs(id))
        except Exception:  # noqa: BLE001 - as above
            return ""

    def stop(self, id: str) -> None:
        """Asks Ray to end a job."""
        try:
            self._client.stop_job(id)
        except Exception:  # noqa: BLE001 - as above: it may have ended by itself
            return
