"""Fetching from a hub: a small server speaks its protocol, since tests run without a network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # processes that import the hub's client, seconds each

FILES = {
    "helpful-base/train.jsonl.gz": b"helpful",
    "harmless-base/train.jsonl.gz": b"harmless",
    "red-team-attempts/red_team_attempts.jsonl.gz": b"not wanted",
    "README.md": b"# HH",
}
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API that a download uses."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        repository, path = "Anthropic/hh-rlhf", self.path.partition("?")[0]
        if path.startswith(f"/api/datasets/{repository}/tree/"):
            entries = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": _etag(name)} for name in FILES]
            self._answer(json.dumps(entries).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/api/datasets/{repository}"):
            info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self._answer(json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif (name := path.removeprefix(f"/datasets/{repository}/resolve/{COMMIT}/")) in FILES:
            self._answer(FILES[name], {"ETag": f'"{_etag(name)}"', "X-Repo-Commit": COMMIT})
        else:
            self.send_error(404)

    def _answer(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _etag(name: str) -> str:
    return hashlib.sha1(FILES[name]).hexdigest()


@pytest.fixture
def hub() -> Iterator[str]:
    """The server's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fetch(endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`rlhf-ray data fetch` against a hub: in its own process, which reads the endpoint once."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "rlhf_ray.cli.main", "data", "fetch", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


def test_the_named_files_are_fetched_and_no_others(hub: str, tmp_path: Path) -> None:
    to = tmp_path / "hh"
    result = fetch(hub, "hh-rlhf", "--to", str(to))
    assert result.returncode == 0, result.stderr
    wanted = ["helpful-base/train.jsonl.gz", "harmless-base/train.jsonl.gz"]
    assert result.stdout.split() == sorted(str(to / name) for name in wanted)
    assert {name: (to / name).read_bytes() for name in wanted} == {name: FILES[name] for name in wanted}
    assert not (to / "README.md").exists() and not (to / "red-team-attempts").exists()


def test_no_hub_and_no_such_name_are_one_line_each(tmp_path: Path) -> None:
    for name, start in (
        ("hh-rlhf", "error: hh-rlhf: Anthropic/hh-rlhf cannot be fetched from the hub ("),
        ("hh", "error: hh: is no dataset that can be fetched; choose one of hh-rlhf"),
    ):
        result = fetch("http://127.0.0.1:9", name, "--to", str(tmp_path / "x"))
        assert result.returncode == 2
        assert result.stderr.startswith(start) and result.stderr.count("\n") == 1, result.stderr
