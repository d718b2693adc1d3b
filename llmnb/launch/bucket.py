"""Ray's own storage path on S3: the file system that carries the credentials to where Ray writes.

Ray's processes on a cluster do not have a person's environment, and credentials in a ``runtime_env`` would be shown to
everyone who may see the cluster. A file system object travels as bytes, like the job.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any
from urllib.parse import urlsplit

from .away import is_s3

__all__ = ["with_filesystem"]

_OPTIONS = {
    "access_key": ("AWS_ACCESS_KEY_ID",),
    "secret_key": ("AWS_SECRET_ACCESS_KEY",),
    "session_token": ("AWS_SESSION_TOKEN",),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}


def with_filesystem(run_config: Any) -> Any:
    """A ``RunConfig`` whose storage on S3 is reached as this process reaches it; any other as it is.

    Args:
        run_config: of ``ray.train``. One with a ``storage_filesystem`` of the person's own stays as it is.
    """
    path = str(run_config.storage_path or "")
    if not is_s3(path) or run_config.storage_filesystem is not None:
        return run_config
    from pyarrow.fs import S3FileSystem

    given: dict[str, Any] = {}
    for option, names in _OPTIONS.items():
        found = next((os.environ[name] for name in names if os.environ.get(name)), None)
        if found:
            given[option] = found
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        parts = urlsplit(endpoint)
        given |= {"endpoint_override": parts.netloc or endpoint, "scheme": parts.scheme or "https"}
    bucket = path.partition("://")[2]
    return dataclasses.replace(run_config, storage_path=bucket, storage_filesystem=S3FileSystem(**given))
