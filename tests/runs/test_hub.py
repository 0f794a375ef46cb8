"""Uploads to the hub: nothing unless asked, checked before any work, nothing but the model, no token in sight.

A small server stands for the hub: it knows one login, and keeps what is committed.
"""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import Done, run_here
from huggingface_hub import constants

TOKEN = "hf_secretsecretsecretsecret"
LOGIN = {
    "name": "me", "orgs": [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}],
    "auth": {"accessToken": {"role": "write"}},
}  # fmt: skip
SHORT = ("--max-steps", "2", "--batch-size", "8", "--warmup-steps", "0", "--eval-pairs", "0")


class Hub(ThreadingHTTPServer):
    """What the server knows: repositories with whether they are private, and their files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.calls: list[str] = []
        self.fails = ""
        self.login: dict[str, Any] = LOGIN


class Requests(BaseHTTPRequestHandler):
    """The few requests that an upload makes."""

    server: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.calls.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": f"bad {self.headers.get('Authorization')}"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer(self.server.login)
        else:
            name = self.path.split("?")[0].removeprefix("/api/models/").split("/revision/")[0]
            if name in self.server.private:
                self.answer({"id": name, "private": self.server.private[name], "siblings": [], "sha": "0" * 40})
            else:
                self.answer({"error": "no"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        self.server.calls.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.fails and self.server.fails in self.path:
            self.answer({"error": f"no room for {TOKEN}"}, 507)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.private.setdefault(name, private)
            self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files.setdefault(name, {})[value["path"]] = base64.b64decode(value["content"])
            address = f"https://huggingface.co/{name}/commit/{'1' * 40}"
            self.answer({"commitUrl": address, "commitOid": "1" * 40, "success": True})
        else:
            self.answer({}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server, and a login to it."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = f"http://127.0.0.1:{server.server_port}"
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint=address))
    yield server
    server.shutdown()
    server.server_close()


def train(world: Path, out: Path, *more: str | Path) -> Done:
    return run_here("train-dpo", "-m", world / "sft", "-d", world / "data", "-o", out, *SHORT, *more)


def test_the_model_its_card_and_its_metrics_are_uploaded_and_nothing_else(
    world: Path, tmp_path: Path, hub: Hub
) -> None:
    assert train(world, tmp_path / "out").code == 0
    assert hub.calls == []
    (tmp_path / "out" / "private notes.txt").write_text("mine")
    done = train(world, tmp_path / "out", "--push-to-hub", "mine")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
    assert hub.private == {"me/mine": True}
    (files,) = hub.files.values()
    made = json.loads((tmp_path / "out" / "run.json").read_text())["files"]
    assert sorted(files) == sorted([*made, "metrics.jsonl"])
    assert all(content == (tmp_path / "out" / name).read_bytes() for name, content in files.items())
    assert "README.md" in files
    assert TOKEN not in done.out + done.err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and TOKEN in path.read_text("latin-1")]


def test_an_upload_that_fails_leaves_the_output_and_says_how_to_go_on(world: Path, tmp_path: Path, hub: Hub) -> None:
    hub.fails = "/commit/"
    done = train(world, tmp_path / "out", "--push-to-hub", "team/mine", "--no-hub-private")
    assert (done.code, done.out) == (1, "")
    assert "the output is complete" in done.error
    assert f"hf upload team/mine {tmp_path / 'out'} ." in done.error
    assert (tmp_path / "out" / "run.json").is_file()
    assert TOKEN not in done.err
    hub.fails = ""
    again = train(world, tmp_path / "out", "--push-to-hub", "team/mine", "--no-hub-private")
    assert (again.code, again.out) == (0, f"{tmp_path / 'out'}\n")
    assert "already finished" in again.err
    assert list(hub.files) == ["team/mine"]
    assert hub.private == {"team/mine": False}


def refused(world: Path, out: Path, *more: str) -> str:
    """The error of a training that never starts."""
    done = train(world, out, "--push-to-hub", *more)
    assert (done.code, done.out) == (2, ""), done.err
    assert not out.exists()
    assert TOKEN not in done.err
    return done.error


def test_what_cannot_work_is_refused_before_anything_is_done(world: Path, tmp_path: Path, hub: Hub,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert "cannot write to repositories of else" in refused(world, out, "else/x")
    assert "cannot write to repositories of readers" in refused(world, out, "readers/x")
    hub.private["team/x"] = False
    assert "team/x exists and is public; add --no-hub-private" in refused(world, out, "team/x")
    hub.login = {**LOGIN, "auth": {"accessToken": {"role": "read"}}}
    assert "may only read" in refused(world, out, "x")
    monkeypatch.setenv("HF_TOKEN", "hf_" + TOKEN[:5])
    assert "the hub refuses the login; run `hf auth login` again" in refused(world, out, "x")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "not logged in to the hub; run `hf auth login` first" in refused(world, out, "x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(world, out, "x")
    assert not [path for path in hub.calls if "create" in path]


def test_a_hub_that_is_not_there(world: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    api = huggingface_hub.hf_api.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9"))
    assert "the hub cannot be reached: ConnectError" in refused(world, tmp_path / "out", "x")


@pytest.mark.parametrize("name", ["a/b/c", "a b", "-x", "x.git", "../x", "", "x" * 97, "True", "--hub-model-id"])
def test_names_that_the_hub_does_not_take(world: Path, tmp_path: Path, name: str) -> None:
    done = train(world, tmp_path / "out", f"--push-to-hub={name}")
    assert (done.code, "--push-to-hub" in done.error) == (2, True), done.err


def test_a_stage_of_the_pipeline_may_be_uploaded_and_not_all_of_them(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("dataset: d\noutput_dir: o\npush_to_hub: x\n")
    done = run_here("run", "--config", config, "--print-config")
    assert (done.code, "push_to_hub" in done.error) == (2, True)
    config.write_text("dataset: d\noutput_dir: o\ntrain: {push_to_hub: x}\n")
    done = run_here("run", "--config", config, "--print-config")
    assert (done.code, done.out.count("push_to_hub: x"), done.out.count("push_to_hub: null")) == (0, 1, 3)


def test_an_adapter_of_a_local_model_is_uploaded_with_a_warning(world: Path, tmp_path: Path, hub: Hub) -> None:
    done = train(world, tmp_path / "out", "--push-to-hub", "x", "--lora-r", "2")
    assert done.code == 0, done.err
    assert "the base model of this adapter is a directory of this machine" in done.err
    merged = run_here("merge", tmp_path / "out", "-o", tmp_path / "merged", "--push-to-hub", "merged")
    assert merged.code == 0, merged.err
    assert "model.safetensors" in hub.files["me/merged"]
    assert os.environ["HF_TOKEN"] not in merged.err
