"""A local S3 server (moto) on loopback, in a process of its own, with a bucket in it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from llmnb.launch.cluster import _free_ports

BUCKET = "llm-test"


class Server:
    """Attributes: ``env``: what a client needs in its environment; ``port``."""

    def __init__(self) -> None:
        for _ in range(3):  # a port that was free may be taken a moment later
            (self.port,) = _free_ports(1)
            if self._start():
                break
        else:
            raise AssertionError("the S3 server does not start")
        self.env = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "a-key-for-tests",
            "AWS_SECRET_ACCESS_KEY": "a-secret-for-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.client().create_bucket(Bucket=BUCKET)

    def _start(self) -> bool:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return True
            except OSError:
                time.sleep(0.1)
        self.process.kill()
        return False

    def client(self):
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            aws_access_key_id="a-key-for-tests",
            aws_secret_access_key="a-secret-for-tests",
            region_name="us-east-1",
        )

    def keys(self, prefix: str = "") -> list[str]:
        found = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [one["Key"] for one in found]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
