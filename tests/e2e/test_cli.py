"""The `mms` command line with a real server beside it: status, stop, predict, config, check, daemon."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mms.archive import MANIFEST
from mms.cli import main
from tests.asking import digest, fetch
from tests.conftest import MakeArchive
from tests.servers import Server, environment, free_ports, is_free, mms, processes_in, scratch, server, start_arguments
from tests.waiting import eventually


@pytest.fixture(scope="module")
def running(make_archive: MakeArchive) -> Iterator[Server]:
    with server(
        make_archive("echo"), make_archive("status_and_headers"), make_archive("crashes_on_predict")
    ) as started:
        yield started


def test_status_shows_models_and_workers(running: Server) -> None:
    shown = mms("status", "--run-dir", str(running.run_dir))
    assert shown.returncode == 0, shown
    assert f"pid {running.pid}" in shown.stdout
    assert "echo" in shown.stdout
    assert "1 of 1" in shown.stdout
    described = json.loads(mms("status", "--run-dir", str(running.run_dir), "--json").stdout)
    assert (described["running"], described["ready"], described["pid"]) == (True, True, running.pid)
    assert [model["modelName"] for model in described["models"]] == ["crashes_on_predict", "echo", "status_and_headers"]
    quiet = mms("status", "--run-dir", str(running.run_dir), "--quiet")
    assert (quiet.returncode, quiet.stdout) == (0, "")


def test_status_and_stop_without_a_server(tmp_path: Path) -> None:
    shown = mms("status", "--run-dir", str(tmp_path))
    assert (shown.returncode, shown.stdout) == (3, f"no server is running in {tmp_path}\n")
    assert json.loads(mms("status", "--run-dir", str(tmp_path), "--json").stdout) == {"running": False}
    stopped = mms("stop", "--run-dir", str(tmp_path))
    assert (stopped.returncode, stopped.stdout) == (0, f"no server is running in {tmp_path}\n")


def test_status_is_3_while_a_model_is_failed(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), make_archive("crashes_on_load")) as failed:
        shown = mms("status", "--run-dir", str(failed.run_dir))
        assert shown.returncode == 3
        assert "FAILED" in shown.stdout


def test_predict_sends_a_file(running: Server, tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_bytes(b'{"a": 1}')
    answered = mms("predict", "echo", str(file), "--run-dir", str(running.run_dir), "--version", "1.0")
    assert answered.returncode == 0
    assert json.loads(answered.stdout)["sha256"] == digest(b'{"a": 1}')
    assert json.loads(answered.stdout)["headers"]["content-type"] == "application/json"
    failed = mms("predict", "crashes_on_predict", str(file), "--run-dir", str(running.run_dir))
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["code"] == 500
    for name in ("e cho", "echo?x", "echo/1.0"):
        unknown = mms("predict", name, str(file), "--run-dir", str(running.run_dir))
        assert json.loads(unknown.stdout)["message"] == f"Model not found: {name}"
    folder = mms("predict", "echo", str(tmp_path), "--run-dir", str(running.run_dir))
    assert (folder.returncode, folder.stderr) == (1, f"mms: error: cannot read {tmp_path}: Is a directory\n")
    nobody = mms("predict", "echo", str(file), "--run-dir", str(tmp_path))
    assert (nobody.returncode, nobody.stderr) == (3, f"mms: error: no server is running in {tmp_path}\n")


def test_config_shows_every_value_and_where_it_is_from(tmp_path: Path) -> None:
    file = tmp_path / "mms.yaml"
    file.write_text("batch_size: 2\nqueue_size: 3\nworkers: 4\nmax_request_size: 1MiB\n")
    words = ("config", "--json", "--config", str(file), "--workers", "6")
    environ = {"MMS_QUEUE_SIZE": "5", "MMS_WORKERS": "5"}
    shown = json.loads(CliRunner().invoke(main, words, env=environ).stdout)
    assert [(shown[name]["value"], shown[name]["origin"]) for name in ("batch_size", "queue_size", "workers")] == [
        ("2", str(file)),
        ("5", "environment"),
        ("6", "command line"),
    ]
    assert (shown["max_request_size"]["value"], shown["edge"]["origin"]) == (str(1 << 20), "default")
    assert all(setting["help"] for setting in shown.values())
    table = mms("config")
    assert table.returncode == 0
    assert all(name in table.stdout for name in shown)


def test_check_tries_an_archive_without_a_server(make_archive: MakeArchive, tmp_path: Path) -> None:
    request = tmp_path / "words.txt"
    request.write_text("hello")
    loaded = mms("check", str(make_archive("echo")))
    assert loaded.returncode == 0
    assert loaded.stdout.startswith("echo 1.0 loads in ")
    answered = mms("check", str(make_archive("echo")), str(request))
    assert answered.returncode == 0
    assert digest(b"hello") in answered.stdout
    assert "\n200\n" in answered.stdout
    set_by_handler = mms("check", str(make_archive("status_and_headers")), str(request))
    assert "\n201\n" in set_by_handler.stdout
    assert "content-type: text/x-greeting" in set_by_handler.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("crashes_on_load", "failed to load: RuntimeError: the weights are missing"),
        ("dies_on_load", "exit code 3"),
        ("crashes_on_predict", "the handler raised ValueError"),
    ],
)
def test_check_names_what_is_wrong(make_archive: MakeArchive, tmp_path: Path, name: str, words: str) -> None:
    request = tmp_path / "words.txt"
    request.write_text("hello")
    checked = mms("check", str(make_archive(name)), str(request))
    assert checked.returncode == 1
    assert checked.stdout == ""
    error = checked.stderr.splitlines()[-1]
    assert error.startswith("mms: error: ")
    assert words in error


def test_check_shows_once_what_the_handler_prints_and_its_traceback(make_archive: MakeArchive, tmp_path: Path) -> None:
    request = tmp_path / "words.txt"
    request.write_text("hello")
    failed = mms("check", str(make_archive("crashes_on_predict")), str(request))
    assert failed.stderr.count("Traceback (most recent call last):") == 1
    assert "ValueError" in failed.stderr.splitlines()[-2]
    unloaded = mms("check", str(make_archive("crashes_on_load")))
    assert unloaded.stderr.count("Traceback (most recent call last):") == 1
    assert unloaded.stderr.count("mms: error:") == 1
    assert "next try" not in unloaded.stderr
    dead = mms("check", str(make_archive("dies_on_load")))
    assert dead.stderr.count("these are my last words") == 1


def test_check_shows_a_refusal_as_the_answer_that_it_is(make_archive: MakeArchive, tmp_path: Path) -> None:
    request = tmp_path / "request"
    request.write_text("unlucky")
    checked = mms("check", str(make_archive("fails_one")), str(request))
    assert (checked.returncode, checked.stderr) == (1, "")
    assert "\n418\ncontent-type: application/json\n" in checked.stdout
    assert '{"code":418,"type":"PredictionException","message":"no luck"}' in checked.stdout


@pytest.mark.parametrize(
    ("words", "told", "code"),
    [
        (("config", "--batch-size"), "Option '--batch-size' requires an argument.", 2),
        (("confg",), "No such command 'confg'.", 2),
        (("config", "--batch-size", "x"), "command line: batch_size = 'x': a whole number is needed", 1),
        (("start", "--models", "x="), "command line: models = ('x=',): x=: name=file is needed", 1),
        (("check", "HERE", "/proc/self/mem"), "cannot read /proc/self/mem: ", 1),
        (("check", "HERE", "HERE"), ": Is a directory", 1),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path: Path, words: tuple[str, ...], told: str, code: int) -> None:
    failed = mms(*(word.replace("HERE", str(tmp_path)) for word in words))
    assert (failed.returncode, failed.stdout) == (code, "")
    (line,) = failed.stderr.splitlines()
    assert line.startswith("mms: error: ")
    assert told in line


def test_config_takes_several_models_as_start_does() -> None:
    shown = CliRunner().invoke(main, ["config", "--json", "--models", "a.mar", "b.mar"])
    assert json.loads(shown.stdout)["models"]["value"] == "a.mar,b.mar"


def test_lists_on_the_command_line_are_taken_apart_as_anywhere_else() -> None:
    groups = '[{"kind":"cpu","count":2,"threads":3}]'
    words = ["config", "--json", "--worker-read", "/a,/b", "--worker-read", "/c d", "--instances", groups]
    shown = json.loads(CliRunner().invoke(main, words).stdout)
    assert [shown[name]["value"] for name in ("worker_read", "instances")] == ["/a,/b,/c d", groups]
    refused = CliRunner().invoke(main, ["config", "--models", "a.mar,=b.mar"])
    assert refused.stderr == "mms: error: command line: models = ('a.mar', '=b.mar'): =b.mar: name=file is needed\n"


def test_lists_on_the_command_line_may_have_commas_and_repetitions() -> None:
    words = ["--allowed-networks", "10.1.0.0/16, 10.2.0.0/16", "--worker-env", "A,B", "--worker-env", "C"]
    shown = json.loads(CliRunner().invoke(main, ["config", "--json", *words]).stdout)
    assert shown["allowed_networks"]["value"].split(",") == ["10.1.0.0/16", "10.2.0.0/16"]
    assert shown["worker_env"]["value"].split(",") == ["A", "B", "C"]


def test_check_of_no_archive(tmp_path: Path) -> None:
    (tmp_path / "a.mar").write_bytes(b"nothing like an archive")
    for path in ("a.mar", "b.mar"):
        checked = mms("check", str(tmp_path / path))
        assert checked.returncode == 1
        (error,) = checked.stderr.strip().splitlines()
        assert path in error


@pytest.mark.parametrize("edge", ["none", "auto"])
def test_a_daemon_is_ready_when_its_start_returns_and_gone_when_its_stop_does(
    make_archive: MakeArchive, edge: str
) -> None:
    with scratch() as folder:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        words = start_arguments(folder, addresses, make_archive("echo"), edge=edge)[4:]
        try:
            started = mms(*words, "--models", "ALL", "--daemon", cwd=folder)
            assert started.returncode == 0, started
            assert started.stdout.startswith("ready in ")
            assert f"log {folder}/run/logs/mms.log" in started.stdout
            assert fetch(addresses[0], "POST", "/predictions/echo", b"x").status == 200
            again = mms(*words, "--daemon", cwd=Path("/"))
            assert again.returncode == 1
            assert again.stderr.startswith("mms: error: a server (pid ")
            stopped = mms("stop", "--run-dir", str(folder / "run"))
            assert (stopped.returncode, stopped.stdout.startswith("stopped the server (pid ")) == (0, True)
            eventually(lambda: not processes_in(folder))
            assert all(is_free(address) for address in addresses)
        finally:
            for process in processes_in(folder):
                process.kill()


def test_a_daemon_logs_to_a_run_directory_of_its_own_only(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    for words in (("start", "--daemon"), ("status",), ("stop",)):
        failed = mms(*words, "--run-dir", str(tmp_path / "run"))
        assert failed.returncode == 1
        assert failed.stderr.startswith(f"mms: error: others may write in the run directory {tmp_path}/run (mode 777)")
    assert not list((tmp_path / "run").iterdir())


def test_a_daemon_that_cannot_start_says_why(tmp_path: Path) -> None:
    failed = mms("start", "--daemon", "--run-dir", str(tmp_path / "run"), "--model-store", str(tmp_path / "nowhere"))
    assert failed.returncode == 1
    assert failed.stderr == (
        f"mms: error: the model store {tmp_path}/nowhere is not a folder; "
        "create it or name another with --model-store\n"
    )


def test_a_name_may_be_given_at_the_start(make_archive: MakeArchive) -> None:
    with scratch() as folder:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        words = start_arguments(folder, addresses, make_archive("echo"), make_archive("rows"))
        started = Server(folder, [*words, "--models", "a=echo-1.0.mar", "b=rows-1.0.mar"], addresses)
        try:
            started.wait_until_ready()
            names = [model["modelName"] for model in started.manage("GET", "/models").json()["models"]]
            assert names == ["a", "b"]
        finally:
            started.close()


def in_the_foreground(folder: Path, archive: str) -> subprocess.CompletedProcess[str]:
    """Runs `folder/archive` on the file `request`, called from `folder`."""
    (folder / "request").write_text("hello")
    words = [sys.executable, "-m", "mms.backend", "--archive", archive, "--request", "request"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=20, check=False)


def test_a_handler_runs_in_the_foreground_for_a_debugger(make_archive: MakeArchive, tmp_path: Path) -> None:
    with zipfile.ZipFile(make_archive("echo")) as archive:
        archive.extractall(tmp_path / "model")
    ran = in_the_foreground(tmp_path, "model")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["sha256"] == digest(b"hello")


def test_a_handler_in_the_foreground_has_its_config_and_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model" / "MAR-INF").mkdir(parents=True)
    manifest = {"model": {"modelName": "m", "handler": "service:handle", "configFile": "model-config.yaml"}}
    (tmp_path / "model" / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "model" / "model-config.yaml").write_text("batch_size: 4\ngreeting: hi\n")
    (tmp_path / "model" / "service.py").write_text(
        "import os\n"
        "def handle(data, context):\n"
        "    size = context.system_properties['batch_size']\n"
        "    return data and [[context.config['greeting'], size, sorted(os.listdir())[0]]]\n"
    )
    ran = in_the_foreground(tmp_path, "model")
    assert (ran.returncode, ran.stdout) == (0, '["hi",4,"MAR-INF"]\n'), ran.stderr


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        ("gone", "gone is no folder; model-archiver --archive-format no-archive makes one"),
        ("request", "request is no folder; model-archiver --archive-format no-archive makes one"),
        (".", "no MAR-INF/MANIFEST.json in it"),
    ],
)
def test_what_cannot_run_in_the_foreground_is_named(tmp_path: Path, archive: str, reason: str) -> None:
    ran = in_the_foreground(tmp_path, archive)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert reason in ran.stderr and ran.stderr.count("\n") == 1


@pytest.fixture
def other_user() -> dict[str, Any]:
    """How `subprocess` runs something as a user without rights: this one, or another if this one is root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    how: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    try:
        subprocess.run([sys.executable, "-c", "import mms"], cwd="/", check=True, capture_output=True, **how)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"other users than root cannot run {sys.executable}")
    return how


def test_a_user_without_rights_serves_in_the_default_folders(
    make_archive: MakeArchive, other_user: dict[str, Any]
) -> None:
    with scratch() as folder:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        words = start_arguments(folder, addresses, make_archive("echo"), run_dir="", cache_dir="", edge="auto")
        for name in ("home", "tmp"):
            (folder / name).mkdir()
            os.chown(folder / name, other_user.get("user", -1), -1)
        environ = environment(HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"))
        for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
            environ.pop(name, None)

        def run(*words: str) -> str:
            done = subprocess.run(
                words, env=environ, cwd=folder, capture_output=True, text=True, timeout=30, check=False, **other_user
            )
            assert (done.returncode, done.stderr) == (0, ""), done
            return str(done.stdout)

        try:
            assert run(*words, "--models", "ALL", "--daemon").startswith("ready in ")
            assert fetch(addresses[0], "POST", "/predictions/echo", bytes(1 << 20)).status == 200
            (run_dir,) = (folder / "tmp").glob("mms-*")
            assert list((folder / "home/.cache/mms/servers").glob("*/models/echo-1"))
            assert run(*words[:4], "stop").startswith("stopped the server")
            assert not (run_dir / "sockets").exists()
        finally:
            for process in processes_in(folder):
                process.kill()
