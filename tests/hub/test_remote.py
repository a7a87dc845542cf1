"""A repository of a Hub that runs here: what huggingface_hub really asks for."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "a" * 40
READ = """
import sys, cbam
for name in sys.argv[1:]:
    try:
        model = cbam.from_pretrained(name)
    except cbam.CBAMError as error:
        print(type(error).__name__, error)
    else:
        print(sum(value.double().sum().item() for value in model.state_dict().values()))
"""


class Hub(BaseHTTPRequestHandler):
    """Somebody's one repository."""

    def __init__(self, folder, asked, *arguments):
        self.folder, self.asked = folder, asked
        super().__init__(*arguments)

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(self.path)
        if self.path.startswith("/api/models/somebody/net/tree/"):
            tree = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "b" * 40}
                for path in self.folder.iterdir()
            ]
            return self.answer(json.dumps(tree).encode())
        if self.path.startswith("/api/models/somebody/net"):
            files = [{"rfilename": path.name} for path in self.folder.iterdir()]
            body = {"id": "somebody/net", "modelId": "somebody/net", "sha": COMMIT, "siblings": files}
            return self.answer(json.dumps({**body, "private": False, "tags": [], "downloads": 0}).encode())
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/somebody/net/resolve/") and (self.folder / name).is_file():
            return self.answer((self.folder / name).read_bytes())
        return self.answer(b"{}", 404, "RepoNotFound")

    def answer(self, body, status=200, code=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def read(folder, tmp_path):
    """read(*names) -> the line of each that a fresh process prints; what it asked for is in `read.asked`."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(*names, **environment):
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
        }
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", READ, *names], capture_output=True, text=True, check=False, timeout=300,
            env={**os.environ, **settings, **environment}, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    ask.asked = asked
    yield ask
    server.shutdown()
    server.server_close()


# K23
def test_a_repository_is_downloaded_and_read(folder, model, read):
    wanted = sum(value.double().sum().item() for value in model.state_dict().values())
    found, nobody = read("somebody/net", "nobody/net")
    assert float(found) == wanted
    assert nobody.startswith("CheckpointNotFoundError nobody/net: no such folder")
    brought = {path.rpartition("/")[2] for path in read.asked if "/resolve/" in path}
    assert brought == {"config.json", "model.safetensors"}


@pytest.mark.large
def test_a_downloaded_repository_is_read_offline(read):
    (wanted,) = read("somebody/net")
    found, nobody = read("somebody/net", "nobody/net", HF_HUB_OFFLINE="1")
    assert found == wanted
    assert "no such folder" in nobody
