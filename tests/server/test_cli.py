"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner, Result

from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.packer_messages import Pack, PackDone
from overcommit.server import cli

PAGE = {
    "models": [
        {
            "name": "minilm",
            "version": "1",
            "state": "READY",
            "reason": "",
            "tier": "DEVICE",
            "device_bytes": 2**20,
            "host_bytes": 0,
            "bytes": 2**20,
            "requests": 7,
            "last_used_s": 3.25,
            "pinned": True,
            "priority": 2,
            "min_resident_s": 0.0,
            "ttl_s": 0.0,
        },
        {
            "name": "bad[red]",
            "version": "1",
            "state": "UNAVAILABLE",
            "reason": "unknown key 'pinn'",
            "tier": "",
            "device_bytes": 0,
            "host_bytes": 0,
            "bytes": 0,
            "requests": 0,
            "last_used_s": None,
            "pinned": False,
            "priority": -1,
            "min_resident_s": 1.5,
            "ttl_s": 300.0,
        },
    ],
    "total": 12,
    "states": {"READY": 9, "UNAVAILABLE": 3},
    "device": {"capacity": 4 * 2**20, "used": 2**20},
    "host": {"capacity": 0, "used": 0},
}
ANSWER = {
    "model_name": "minilm",
    "model_version": "1",
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 1]}],
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("OVERCOMMIT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


def run(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), input=input)


class FakeServer(http.server.BaseHTTPRequestHandler):
    """Answers like a server; remembers what it was asked."""

    asked: ClassVar[list[tuple[str, bytes]]] = []

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body: bytes) -> None:
        self.asked.append((self.path, body))
        status, value = 200, b"[]"
        if self.path.startswith("/v2/overcommit/models"):
            value = json.dumps(PAGE).encode()
        elif self.path.startswith("/v2/models/minilm"):
            value = json.dumps(ANSWER).encode()
        elif self.path.startswith("/v2/models/"):
            status, value = 404, b'{"error": "Request for unknown model: \'x\' is not found"}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        FakeServer.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


# --- serve --------------------------------------------------------------------------------------
def test_serve_gives_its_settings_to_the_supervisor_and_ends_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overcommit.runtime import supervisor

    seen = []
    monkeypatch.setattr(supervisor, "run", lambda settings: seen.append(settings) or 3)
    result = run("serve", str(tmp_path), "--port", "0", "--cache-dir", str(tmp_path / ".c"))
    assert result.exit_code == 3, result.output
    assert seen[0].repositories == (str(tmp_path),)
    assert seen[0].port == 0


def test_serve_and_settings_import_no_torch_and_no_numpy() -> None:
    code = (
        "import sys, overcommit.server.cli, overcommit.server.settings\n"
        "import overcommit.runtime.supervisor\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_a_user_error_is_one_line_on_stderr_and_status_2(tmp_path: Path) -> None:
    result = run("serve", str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("overcommit: the model repository")
    assert result.stderr.count("\n") == 1


def test_an_error_of_the_supervisor_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overcommit.runtime import supervisor

    def refuse(settings: object) -> int:
        raise ConfigurationError("cannot listen")

    monkeypatch.setattr(supervisor, "run", refuse)
    result = run("serve", str(tmp_path), "--cache-dir", str(tmp_path / ".c"))
    assert (result.exit_code, result.stderr) == (2, "overcommit: cannot listen\n")


def test_an_interrupt_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from overcommit.runtime import supervisor

    def interrupt(settings: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(supervisor, "run", interrupt)
    result = run("serve", str(tmp_path), "--cache-dir", str(tmp_path / ".c"))
    assert (result.exit_code, result.output) == (130, "")


@pytest.mark.parametrize(
    "arguments", [("nothing",), ("serve", "--nothing"), ("infer", "m"), ("pack",), ()]
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_the_version_is_printed() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("overcommit ")


@pytest.mark.parametrize("command", ["serve", "pack", "models", "infer", "demo"])
def test_every_command_has_help(command: str) -> None:
    assert run(command, "--help").exit_code == 0


def test_the_module_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "overcommit", "serve"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("overcommit: no model repository")


# --- models -------------------------------------------------------------------------------------
def test_models_shows_state_tier_and_reason(url: str) -> None:
    result = run("models", "--url", url, "--offset", "3", "--limit", "5")
    assert result.exit_code == 0, result.output
    assert FakeServer.asked[0][0] == "/v2/overcommit/models?offset=3&limit=5"
    for word in ("minilm", "ready", "device", "1.0 MiB", "3.2 s", "bad[red]", "'pinn'"):
        assert word in result.stdout
    assert "2 of 12 versions   9 ready   3 unavailable" in result.stdout
    assert "(25%)" in result.stdout


def test_models_shows_what_else_decides_about_a_stay(url: str) -> None:
    shown = run("models", "--url", url).stdout
    assert "pinned, priority 2" in shown
    assert "priority -1, stays 1.5 s, ttl 5 min" in shown


def test_models_shows_the_most_asked_first_when_told(url: str) -> None:
    assert run("models", "--url", url, "--top", "--limit", "5").exit_code == 0
    assert FakeServer.asked[0][0] == "/v2/overcommit/models?offset=0&limit=5&order=requests"


def test_models_shows_those_alone_that_are_asked_for(url: str) -> None:
    assert run("models", "--url", url, "--state", "unavailable", "--reasons").exit_code == 0
    path = "/v2/overcommit/models?offset=0&limit=100&state=UNAVAILABLE&reason=true"
    assert FakeServer.asked[0][0] == path


def test_models_as_json_is_what_the_server_says(url: str) -> None:
    assert json.loads(run("models", "--url", url, "--json").stdout) == PAGE


def test_models_can_name_the_server_by_a_variable(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERCOMMIT_URL", url)
    assert run("models").exit_code == 0


@pytest.mark.parametrize("where", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_no_server_says_how_to_start_one(where: str) -> None:
    result = run("models", "--url", where)
    assert result.exit_code == 2
    assert "start one with `overcommit serve`" in result.stderr


@pytest.mark.parametrize("where", ["ftp://x", "http://", "http://a:b"])
def test_a_bad_url_is_refused(where: str) -> None:
    result = run("models", "--url", where)
    assert result.exit_code == 2
    assert "is no URL" in result.stderr


def test_another_server_is_recognised(url: str) -> None:
    result = run("models", "--url", f"{url}/other")
    assert result.exit_code == 2
    assert "is no overcommit server" in result.stderr


# --- infer --------------------------------------------------------------------------------------
REQUEST = '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}'


def test_infer_posts_the_file_as_it_is(url: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(REQUEST)
    result = run("infer", "minilm", "-i", str(tmp_path / "r.json"), "--url", url)
    assert json.loads(result.stdout) == ANSWER
    assert FakeServer.asked == [("/v2/models/minilm/infer", REQUEST.encode())]


def test_infer_reads_stdin_and_names_a_version(url: str) -> None:
    result = run("infer", "minilm", "-i", "-", "--version", "2", "--url", url, input=REQUEST)
    assert result.exit_code == 0, result.output
    assert FakeServer.asked[0][0] == "/v2/models/minilm/versions/2/infer"


def test_a_model_name_cannot_leave_its_place_in_the_path(url: str) -> None:
    run("infer", "../x?y", "-i", "-", "--url", url, input=REQUEST)
    assert FakeServer.asked[0][0] == "/v2/models/..%2Fx%3Fy/infer"


def test_the_servers_error_is_passed_on(url: str) -> None:
    result = run("infer", "x", "-i", "-", "--url", url, input=REQUEST)
    assert result.exit_code == 2
    assert result.stderr == (
        "overcommit: the server says 404: Request for unknown model: 'x' is not found\n"
    )


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is no JSON"), ("[]", "is no V2 request"), ("{}", "is no V2 request")]
)
def test_a_bad_request_file_is_refused_before_it_is_sent(text: str, said: str) -> None:
    result = run("infer", "m", "-i", "-", input=text)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_missing_request_file_is_refused(tmp_path: Path) -> None:
    result = run("infer", "m", "-i", str(tmp_path / "none.json"))
    assert result.exit_code == 2
    assert "cannot be read: No such file" in result.stderr


# --- pack ---------------------------------------------------------------------------------------
def fake_pack(folder: Path) -> Callable[..., PackDone]:
    def pack(job: Pack, on_progress: Callable[[int, int], None]) -> PackDone:
        on_progress(1, 2)
        if "bad" in job.name:
            return PackDone(job=job.job, ok=False, message=f"no engine runs '{job.name}'")
        image = folder / f"{job.name}.image"
        image.write_bytes(b"x")
        return PackDone(job=job.job, ok=True, image_path=str(image), nbytes=1, engine="torch")

    return pack


def pack_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    from rich.console import Console

    from overcommit.server.pack_command import pack_repositories

    roots = (str(tmp_path / "models"),)
    cache = str(tmp_path / "cache")
    status = pack_repositories(roots, cache, False, Console(width=200), fake_pack(tmp_path))
    return status, capsys.readouterr().out


def test_pack_makes_what_is_missing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "w").write_text(name)
    status, text = pack_all(tmp_path, capsys)
    assert status == 0
    assert "2 versions are ready to serve, 0 are not" in text
    _, text = pack_all(tmp_path, capsys)
    assert text.count("was packed") == 2


def test_pack_ends_with_1_and_the_reason_when_a_version_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bad", "good", "b ad"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "w").write_text(name)
    status, text = pack_all(tmp_path, capsys)
    assert status == 1
    assert "bad version 1: no engine runs 'bad'" in text
    assert "'b ad' is no model name" in text
    assert "1 versions are ready to serve, 2 are not" in text


@pytest.mark.slow
def test_pack_packs_a_real_model(tmp_path: Path, make_bert: Callable[[Path, int], None]) -> None:
    make_bert(tmp_path / "models" / "bert", 1)
    result = run("pack", str(tmp_path / "models"), "--cache-dir", str(tmp_path / "cache"))
    assert result.exit_code == 0, result.output
    assert "1 versions are ready to serve" in result.stdout


def test_compiling_says_at_once_what_is_wrong(tmp_path: Path) -> None:
    program = tmp_path / "model.pt2"
    program.write_bytes(b"no archive")
    for target, problem in (
        (tmp_path / "none" / "x.aoti", "is no folder"),
        (tmp_path / "x.aoti", "no .pt2"),
    ):
        result = CliRunner().invoke(cli.app, ["compile", str(program), str(target)])
        assert result.exit_code == 2
        assert problem in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
