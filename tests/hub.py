"""A model hub on loopback, small enough to read: it takes what huggingface_hub's own client uploads, and keeps it."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """``files``: contents by path; ``made``: what repositories were made with; ``token``: the one that is let in."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.files: dict[str, bytes] = {}
        self.made: list[dict[str, Any]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200, {"sha": "0" * 40, "siblings": [], "id": "a/b"})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self._answer(401, {"error": "Invalid user token."})
                elif self.path == "/api/repos/create":
                    asked = json.loads(body)
                    hub.made.append({**asked, "private": asked.get("private") or asked.get("visibility") == "private"})
                    self._answer(200, {"url": f"{hub.url}/{hub.made[-1].get('organization')}/{hub.made[-1]['name']}"})
                elif self.path == "/api/validate-yaml":
                    self._answer(200, {"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    files = json.loads(body)["files"]
                    said = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                    self._answer(200, {"files": said})
                elif "/commit/" in self.path:
                    for line in body.splitlines():
                        said = json.loads(line)
                        if said["key"] == "file":
                            hub.files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
                    self._answer(
                        200,
                        {
                            "commitUrl": f"{hub.url}/{'/'.join(self.path.split('/')[3:5])}/commit/1",
                            "commitOid": "1" * 40,
                            "success": True,
                        },
                    )
                else:
                    self._answer(404, {"error": self.path})

            def _answer(self, code: int, data: Any) -> None:
                content = json.dumps(data).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *words: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
