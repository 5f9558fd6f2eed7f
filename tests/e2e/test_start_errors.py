"""What `mms start` says when it cannot start: one line on standard error, exit code 1, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from mms.cli import main
from tests.conftest import MakeArchive
from tests.servers import environment, free_ports, mms, needs_nginx, processes_in, scratch, server, start_arguments
from tests.waiting import eventually


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as path:
        yield path


def refusal(folder: Path, *archives: Path, models: tuple[str, ...] = (), **settings: Any) -> str:
    """The one line of a start that must fail."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
    words = start_arguments(folder, addresses, *archives, **settings)
    for model in models:
        words += ["--models", model]
    ended = subprocess.run(
        words, capture_output=True, text=True, timeout=20, cwd=folder, env=environment(), check=False
    )
    assert ended.returncode == 1, ended
    eventually(lambda: not processes_in(folder))
    errors = ended.stderr.splitlines()
    assert errors[-1].startswith("mms: error: ")
    assert len(errors) == 1, ended.stderr
    assert not [line for line in ended.stdout.splitlines() if line.startswith("ready")]
    return errors[0].removeprefix("mms: error: ")


def mistake(folder: Path, **settings: Any) -> str:
    """The one line of a start whose settings are wrong: it ends in this process, before there is anything to start."""
    words = start_arguments(folder, [f"127.0.0.1:{port}" for port in free_ports(3)], **settings)
    ended = CliRunner().invoke(main, words[words.index("start") :])
    assert (ended.exit_code, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("mms: error: ")
    return line.removeprefix("mms: error: ")


@pytest.mark.parametrize("edge", ["none", pytest.param("nginx", marks=needs_nginx)])
@pytest.mark.parametrize("which", ["inference", "management", "metrics"])
def test_f70_a_port_in_use_is_named(folder: Path, make_archive: MakeArchive, which: str, edge: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        setting: dict[str, Any] = {f"{which}_address": f"127.0.0.1:{port}"}
        text = refusal(folder, make_archive("echo"), models=("echo-1.0.mar",), edge=edge, **setting)
    assert f"127.0.0.1:{port}" in text
    assert text.endswith(f"Address already in use (held by {psutil.Process().name()} (pid {os.getpid()}))")


def test_f70_an_address_of_another_machine(folder: Path) -> None:
    assert "cannot listen on 192.0.2.1:80" in refusal(folder, inference_address="192.0.2.1:80")


@pytest.mark.parametrize("edge", ["none", pytest.param("nginx", marks=needs_nginx)])
def test_f70_a_host_that_does_not_exist(folder: Path, edge: str) -> None:
    text = refusal(folder, inference_address="nowhere.invalid:80", edge=edge)
    assert text.startswith("cannot listen on nowhere.invalid:80: ")
    assert "(" not in text


def test_a_missing_store(folder: Path) -> None:
    assert refusal(folder, model_store=folder / "nowhere").startswith(
        f"the model store {folder}/nowhere is not a folder"
    )


def test_models_without_a_store(folder: Path) -> None:
    text = refusal(folder, models=("cat.mar",), model_store="")
    assert "started without --model-store" in text


def test_a_missing_archive_names_those_there_are(folder: Path, make_archive: MakeArchive) -> None:
    text = refusal(folder, make_archive("echo"), models=("cat.mar",))
    assert text == "cat.mar is not in the model store; it holds echo-1.0.mar"


@pytest.mark.parametrize("data", [b"nothing like an archive", b"", b"PK\x05\x06" + bytes(18)])
def test_a_broken_archive(folder: Path, data: bytes) -> None:
    (folder / "store").mkdir()
    (folder / "store" / "broken.mar").write_bytes(data)
    assert "broken.mar" in refusal(folder, models=("broken.mar",))


def test_a_changed_archive(folder: Path, make_archive: MakeArchive) -> None:
    (folder / "store").mkdir()
    data = bytearray(make_archive("echo").read_bytes())
    data[60] ^= 0xFF
    (folder / "store" / "changed.mar").write_bytes(data)
    assert "changed.mar" in refusal(folder, models=("changed.mar",))


def test_no_model_that_loads(folder: Path, make_archive: MakeArchive) -> None:
    words = start_arguments(folder, [f"127.0.0.1:{port}" for port in free_ports(3)], make_archive("crashes_on_load"))
    ended = mms(*words[4:], "--models", "ALL", "--daemon", cwd=folder)
    assert (ended.returncode, ended.stdout) == (1, "")
    error = f"mms: error: no model could be loaded: {REASON} (more in {folder}/run/logs)"
    assert ended.stderr.splitlines()[-1] == error
    eventually(lambda: not processes_in(folder))
    assert "the weights are missing" in (folder / "run/logs/crashes_on_load.log").read_text()


@pytest.mark.parametrize(
    ("management", "where"),
    [
        ("127.0.0.1:9001", "127.0.0.1:9001"),
        ("localhost:9001", "127.0.0.1:9001 and localhost:9001"),
        ("0.0.0.0:9001", "127.0.0.1:9001 and 0.0.0.0:9001"),
    ],
)
def test_one_address_for_two_listeners(folder: Path, management: str, where: str) -> None:
    text = refusal(folder, inference_address="127.0.0.1:9001", management_address=management)
    assert text == (f"inference_address and management_address would both listen on {where}; each needs its own")
    assert not (folder / "run").exists()


@pytest.mark.parametrize("edge", ["none", "auto"])
def test_an_access_log_without_nginx(folder: Path, edge: str) -> None:
    text = refusal(folder, edge=edge, nginx="no-such-nginx", access_log=folder / "access.log")
    assert text.startswith("access_log is written by nginx")


def test_two_archives_of_one_model(folder: Path, make_archive: MakeArchive) -> None:
    text = refusal(folder, make_archive("echo"), models=("echo-1.0.mar", "echo=echo-1.0.mar"))
    assert "both hold model echo 1.0" in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("inference_address", "8080", "host:port or unix:/path is needed"),
        ("edge", "apache", "one of auto, nginx, none is needed"),
        ("batch_size", "0", "must be at least 1"),
        ("batch_size", "many", "batch_size = 'many'"),
        ("max_request_size", "1 apple", "a size is needed"),
        ("response_timeout", "nan", "a finite number is needed"),
    ],
)
def test_an_impossible_setting(folder: Path, name: str, value: str, words: str) -> None:
    assert words in mistake(folder, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("run_dir", "/proc/mms", "cannot use the run directory /proc/mms"),
        ("cache_dir", "/proc/mms", "cannot use the cache directory /proc/mms"),
        ("nginx", "no-such-nginx", "no-such-nginx"),
        ("log_file", "/nowhere/mms.log", "/nowhere/mms.log"),
    ],
)
def test_a_setting_that_is_impossible_here(folder: Path, name: str, value: str, words: str) -> None:
    settings: dict[str, Any] = {"edge": "nginx"} if name == "nginx" else {}
    assert words in refusal(folder, **{**settings, name: value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_sise: 1\n", "unknown setting batch_sise; did you mean batch_size?"),
        ("batch_size: [1\n", "line"),
        ("- 1\n", "must hold 'key: value' lines"),
        ("batch_size: 1\nbatch_size: 2\n", "batch_size stands twice"),
        ("a: &a [1]\nb: *a\n", "aliases are not allowed"),
    ],
)
def test_a_bad_settings_file(folder: Path, text: str, words: str) -> None:
    file = folder / "mms.yaml"
    file.write_text(text)
    error = mistake(folder, config=file)
    assert str(file) in error
    assert words in error


def test_an_unknown_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMS_BATCHSIZE", "1")
    text = mistake(folder)
    assert text == "environment: unknown setting MMS_BATCHSIZE; did you mean MMS_BATCH_SIZE?"


def test_an_unknown_option_is_a_usage_error() -> None:
    ended = CliRunner().invoke(main, ["start", "--batch-sise", "1"])
    assert ended.exit_code == 2
    assert "No such option '--batch-sise'. (Did you mean one of: '--batch-size'," in ended.stderr


def test_f53_a_second_start_in_one_run_directory_leaves_the_first_alone(make_archive: MakeArchive) -> None:
    with server(make_archive("echo")) as first:
        words = start_arguments(first.folder, [f"127.0.0.1:{port}" for port in free_ports(3)])
        second = subprocess.run(
            words, capture_output=True, text=True, timeout=20, cwd="/", env=environment(), check=False
        )
        assert second.returncode == 1
        assert second.stderr == (
            f"mms: error: a server (pid {first.pid}) is running in {first.run_dir}; "
            "stop it with mms stop, or choose another --run-dir\n"
        )
        assert first.predict("echo", b"x").status == 200


@needs_nginx
def test_a_run_directory_that_is_too_long_for_sockets(folder: Path) -> None:
    text = refusal(folder, run_dir=folder / ("x" * 100), edge="nginx")
    assert "longer than 107 bytes; choose a shorter run_dir" in text


def test_a_run_directory_that_is_a_link(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "link").symlink_to(folder / "real")
    assert "is a link or a file, not a folder" in refusal(folder, run_dir=folder / "link")


REASON = "the handler of crashes_on_load 1.0 failed to load: RuntimeError: the weights are missing"


def test_a_model_that_does_not_load_is_no_reason_not_to_start(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), make_archive("crashes_on_load")) as running:
        assert " s: 1 of 2 models at " in running.ready_line
        assert running.ready_line.endswith(f"; FAILED: {REASON}")
        assert running.predict("echo", b"x").status == 200
        assert running.predict("crashes_on_load", b"x").status == 503
