"""A job's parcel for another machine: one zip with the job, what travels of the person's environment, and the porter.

Of the environment only what is named here travels: tokens and switches that mean the same everywhere, never a path.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from ..job import TrainJob
from . import porter

__all__ = ["EMPTY", "HOME_THERE", "travelling", "wrap"]

# Our folder on a node: below the home folder of whom Ray runs as there.
HOME_THERE = "~/.llmnb"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"

_ALWAYS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "WANDB_ENTITY",
    "WANDB_MODE",
    "WANDB_PROJECT",
    "TOKENIZERS_PARALLELISM",
)
# Only with a run that has something on S3.
_FOR_S3 = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
)


def travelling(*, s3: bool) -> dict[str, str]:
    """What of this process's environment goes with a job to another machine.

    Args:
        s3: True when the run keeps something at ``s3://``.
    """
    return {name: os.environ[name] for name in _ALWAYS + (_FOR_S3 if s3 else ()) if name in os.environ}


def wrap(job: TrainJob, *, package: str, needs: list[str], extras: list[str], s3: bool) -> bytes:
    """The zip.

    Args:
        job: as the worker there will read it.
        package: the name that the zip will have in the cluster.
        needs: modules that the run imports.
        extras: of llmnb, which bring them.
        s3: True when the run keeps something at ``s3://``.
    """
    note = {
        "run": job.run,
        "uri": job.uri,
        "away": job.away,
        "package": package,
        "python": PYTHON,
        "llmnb": sys.modules[porter.__name__.partition(".")[0]].__version__,
        "needs": needs,
        "extras": extras,
    }
    with tempfile.TemporaryDirectory() as folder:  # mode 0700
        pickled = job.write(Path(folder) / "job.pickle").read_bytes()
    return _zipped(
        {
            "porter.py": Path(porter.__file__).read_bytes(),
            "note.json": json.dumps(note).encode(),
            "job.pickle": pickled,
            "job.env": json.dumps(travelling(s3=s3) | {"LLMNB_HOME": HOME_THERE}).encode(),
        }
    )


def _zipped(files: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # of no date: equal files, equal zips
    return held.getvalue()


#: What takes a parcel's place once it was read.
EMPTY = _zipped({"read": b""})
