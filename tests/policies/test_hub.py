"""Policies in folders, and in repositories of a Hub that huggingface_hub talks to over HTTP."""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from blocktune.policies import BlockPolicy, ModelIdentity, PolicyError

MODEL = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=8, fingerprint="0" * 64)
POLICY = BlockPolicy.from_step_mask(MODEL, [1, 1, 0, 1, 0])


class LocalHub(ThreadingHTTPServer):
    """As much of the Hub's protocol as making a repository, committing small files and downloading take."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}  # repository -> path -> content
        self.commits: list[dict[str, Any]] = []


class Request(BaseHTTPRequestHandler):
    server: LocalHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
        owner, name, action, revision = self.path.removeprefix("/api/models/").split("?")[0].split("/")
        if action == "preupload":
            return self.answer(
                {"files": [f | {"uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]}
            )
        header, *files = [json.loads(line) for line in body.splitlines()]
        content = {file["value"]["path"]: base64.b64decode(file["value"]["content"]) for file in files}
        self.server.repositories[f"{owner}/{name}"] |= content
        told = {"revision": revision, "files": sorted(content), "token": self.headers["authorization"]}
        self.server.commits.append(header["value"] | told)
        return self.answer({"commitUrl": f"{self.server.url}/{owner}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def do_GET(self) -> None:
        owner, name, _, _, *path = self.path.split("?")[0].lstrip("/").split("/")
        content = self.server.repositories.get(f"{owner}/{name}", {}).get("/".join(path))
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        tag = hashlib.sha1(content).hexdigest()
        return self.answer(content, headers={"ETag": f'"{tag}"', "X-Repo-Commit": "1" * 40})

    do_HEAD = do_GET

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub of its own for the test, which huggingface_hub takes for the real one."""
    with LocalHub() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
        server.shutdown()


def test_a_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    POLICY.save_pretrained(tmp_path / "made" / "here")
    assert [path.name for path in (tmp_path / "made" / "here").iterdir()] == ["policy.json"]
    assert BlockPolicy.from_pretrained(tmp_path / "made" / "here") == POLICY
    assert BlockPolicy.from_pretrained(str(tmp_path / "made"), subfolder="here") == POLICY


def test_a_pushed_policy_comes_back_from_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    url = POLICY.push_to_hub("someone/fast", token="hf_secret", commit_message="Faster")
    assert url == f"{hub.url}/someone/fast/commit/{'1' * 40}"
    (commit,) = hub.commits
    assert (commit["summary"], commit["revision"], commit["files"]) == ("Faster", "main", ["policy.json"])
    assert commit["token"] == "Bearer hf_secret"
    assert BlockPolicy.from_pretrained("someone/fast", cache_dir=tmp_path) == POLICY
    hub.repositories.clear()
    assert BlockPolicy.from_pretrained("someone/fast", cache_dir=tmp_path, local_files_only=True) == POLICY


def test_a_repository_holds_policies_in_subfolders_and_takes_a_second_push(hub: LocalHub, tmp_path: Path) -> None:
    other = BlockPolicy.from_step_mask(MODEL, [1, 0])
    POLICY.push_to_hub("someone/both", subfolder="balanced")
    other.push_to_hub("someone/both", subfolder="fast")
    assert [commit["files"] for commit in hub.commits] == [["balanced/policy.json"], ["fast/policy.json"]]
    assert BlockPolicy.from_pretrained("someone/both", subfolder="balanced", cache_dir=tmp_path) == POLICY
    assert BlockPolicy.from_pretrained("someone/both", subfolder="fast", cache_dir=tmp_path) == other


def test_what_cannot_be_had_is_refused_in_one_sentence(hub: LocalHub, tmp_path: Path) -> None:
    for name in ("someone/none", "no such place", tmp_path / "nowhere"):
        with pytest.raises(
            PolicyError, match=r"is no folder, and its policy\.json cannot be had from the Hub"
        ) as refused:
            BlockPolicy.from_pretrained(name, cache_dir=tmp_path)
        assert "\n" not in str(refused.value)
    with pytest.raises(PolicyError, match=r"policy\.json cannot be read: No such file"):
        BlockPolicy.from_pretrained(tmp_path)
    (tmp_path / "policy.json").write_text("{}")
    with pytest.raises(PolicyError, match=r"policy\.json: schema_version is missing"):
        BlockPolicy.from_pretrained(tmp_path)


def test_no_test_here_reaches_for_another_machine():
    with socket.socket() as there, pytest.raises(AssertionError, match=r"a test reaches for 192\.0\.2\.1"):
        there.connect(("192.0.2.1", 443))  # of a net that is nowhere
