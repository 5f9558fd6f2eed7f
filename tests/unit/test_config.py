"""Settings: where they come from and which source wins, how values are read, what a hostile YAML file may do."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mms.config import Config, load_config
from mms.errors import ConfigError
from mms.folders import default_cache_dir, default_run_dir, default_state
from mms.safe_yaml import MAX_FILE, parse_yaml, read_yaml
from mms.setting import parse_setting, show_setting


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "mms.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# precedence


def test_each_source_overrides_the_one_before_and_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "batch_size: 2\nqueue_size: 20\nworkers: 3\n")
    config, origins = load_config(
        file=file, environ={"MMS_QUEUE_SIZE": "30", "MMS_WORKERS": "4", "HOME": "/"}, command_line={"workers": 5}
    )
    assert (config.parallel_loads, config.batch_size, config.queue_size, config.workers) == (4, 2, 30, 5)
    assert [origins[name] for name in ("parallel_loads", "batch_size", "queue_size", "workers")] == [
        "default", str(file), "environment", "command line",
    ]  # fmt: skip


def test_without_sources_everything_is_default() -> None:
    config, origins = load_config(environ={})
    run_dir, cache_dir = default_run_dir(), default_cache_dir()
    assert config == Config(run_dir=run_dir, cache_dir=cache_dir, state=default_state(cache_dir, run_dir, None))
    assert set(origins.values()) == {"default"}


def test_s1_s17_only_inference_is_for_other_machines_unless_it_is_said() -> None:
    config = load_config(environ={})[0]
    assert [config.management_address, config.metrics_address] == ["127.0.0.1:8081", "127.0.0.1:8082"]


def test_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMS_LOG_LEVEL", "debug")
    assert load_config()[0].log_level == "debug"


def test_an_empty_run_directory_is_the_default_one() -> None:
    assert load_config(environ={"MMS_RUN_DIR": ""})[0].run_dir == default_run_dir()


def test_the_cache_is_on_disk_wherever_there_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache/mms"
    monkeypatch.setenv("HOME", "/nonexistent")
    assert default_cache_dir() == Path(f"/var/tmp/mms-cache-{os.getuid()}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_cache_dir() == tmp_path / "cache/mms"


@pytest.mark.parametrize(
    ("file", "environ", "command_line", "message"),
    [
        ("batch_sice: 2", {}, {}, "unknown setting batch_sice; did you mean batch_size?"),
        ("", {"MMS_QUEUE_SICE": "1"}, {}, "environment: unknown setting MMS_QUEUE_SICE; did you mean MMS_QUEUE_SIZE?"),
        ("", {}, {"wokers": 1}, "command line: unknown setting wokers; did you mean workers?"),
        ("xyzzy: 1", {}, {}, "unknown setting xyzzy$"),
        ("batch_size: many", {}, {}, "batch_size = 'many'"),
        ("batch_size: 0", {}, {}, "batch_size = 0: must be at least 1"),
        ("", {"MMS_EDGE": "apache"}, {}, "environment: edge = 'apache': one of auto, nginx, none is needed"),
    ],
)
def test_a_wrong_setting_names_its_source_and_the_nearest(
    tmp_path: Path, file: str, environ: dict[str, str], command_line: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file=write(tmp_path, file), environ=environ, command_line=command_line)


def test_the_defaults_of_models_come_from_the_server() -> None:
    config, _ = load_config(environ={"MMS_BATCH_SIZE": "8", "MMS_MAX_BATCH_DELAY": "50", "MMS_WORKERS": "2"})
    defaults = config.model_defaults()
    assert (defaults.batch_size, defaults.max_batch_delay, defaults.min_workers) == (8, 0.05, 2)


# values


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_request_size", "1048576", 1 << 20),
        ("max_request_size", 5, 5),
        ("max_request_size", "100MiB", 100 << 20),
        ("max_request_size", "2 GB", 2 * 10**9),
        ("max_request_size", "3kib", 3 << 10),
        ("max_batch_delay", "100", 0.1),
        ("max_batch_delay", 2.5, 0.0025),
        ("batch_size", "8", 8),
        ("batch_size", 8.0, 8),
        ("verify_archives", "off", False),
        ("verify_archives", "Yes", True),
        ("verify_archives", True, True),
        ("models", "a.mar, b=c.mar", ("a.mar", "b=c.mar")),
        ("models", ["a.mar", "ALL"], ("a.mar", "ALL")),
        ("models", "", ()),
        ("edge", False, "none"),
        ("model_store", "", None),
        ("model_store", "/store", Path("/store")),
        ("inference_address", "http://0.0.0.0:80/", "0.0.0.0:80"),
        ("inference_address", "[::1]:8080", "[::1]:8080"),
        ("inference_address", "unix:/run/x", "unix:/run/x"),
    ],
)
def test_values_are_read(name: str, text: Any, value: Any) -> None:
    assert parse_setting(Config, name, text, "test") == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_request_size", "1.5MiB"),
        ("max_request_size", "-1"),
        ("max_request_size", "0"),
        ("max_request_size", True),
        ("max_request_size", "1" * 5000),
        ("max_request_size", "9000000000GiB"),
        ("batch_size", True),
        ("batch_size", 1.5),
        ("batch_size", None),
        ("batch_size", [1]),
        ("response_timeout", "nan"),
        ("response_timeout", "inf"),
        ("response_timeout", 1e300),
        ("response_timeout", 0),
        ("max_batch_delay", -1),
        ("verify_archives", "maybe"),
        ("models", {"a": 1}),
        ("nginx", 5),
        ("inference_address", "8080"),
        ("inference_address", ":8080"),
        ("inference_address", "x:99999"),
        ("inference_address", "x:http"),
    ],
)
def test_values_that_make_no_sense_are_refused(name: str, text: Any) -> None:
    with pytest.raises(ConfigError, match=f"test: {name} = "):
        parse_setting(Config, name, text, "test")


@pytest.mark.parametrize("field", fields(Config), ids=lambda field: str(field.name))
def test_a_default_survives_being_shown_and_read(field: Any) -> None:
    shown = show_setting(Config, field.name, field.default)
    if field.default is not None:
        assert parse_setting(Config, field.name, shown, "test") == field.default
    assert field.metadata["help"]


def test_the_server_has_the_bounds_of_its_models() -> None:
    for name in ("workers", "batch_size", "queue_size"):
        with pytest.raises(ConfigError, match="must be at most"):
            load_config(environ={}, command_line={name: "100000000"})


@pytest.mark.parametrize("word", ["=spam.mar", "x=", "="])
def test_a_model_at_start_has_name_and_file(word: str) -> None:
    with pytest.raises(ConfigError, match=r"name=file is needed"):
        load_config(environ={}, command_line={"models": ["a.mar", word]})


def test_a_model_at_start_may_have_an_address_with_an_equals_sign() -> None:
    models = ("ALL", "a=b.mar", "https://a/b.mar#sha256=00", "https://a/b.mar?x=")
    assert load_config(environ={}, command_line={"models": list(models)})[0].models == models


# files


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (b"", {}),
        (b"# nothing\n", {}),
        (b"a: 1\nb: [x, y]\nc: {d: e}\n", {"a": 1, "b": ["x", "y"], "c": {"d": "e"}}),
        (b"\xef\xbb\xbfa: 1\n", {"a": 1}),
        ("a: ü\n".encode("utf-16"), {"a": "ü"}),
        (b"a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        (b"a: {b: {c: 1}}\nd: {b: {c: 1}}\n", {"a": {"b": {"c": 1}}, "d": {"b": {"c": 1}}}),
    ],
)
def test_a_file_is_one_mapping(tmp_path: Path, text: bytes, content: dict[str, Any]) -> None:
    assert read_yaml(write(tmp_path, text)) == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- a\n- b\n", "must hold 'key: value' lines"),
        (b"just text\n", "must hold 'key: value' lines"),
        (b"1: a\n", "must hold 'key: value' lines"),
        (b"a: 1\na: 2\n", "line 2: a stands twice"),
        (b"x:\n  a: 1\n  a: 2\n", "line 3: a stands twice"),
        (b"a: &x 1\nb: *x\n", "line 2: aliases are not allowed"),
        (b"a: 1\n\tb: 2\n", "line 2"),
        (b"a: [1\n", "line 2"),
        (b"a: !!python/object/apply:os.system [ls]\n", "line 1"),
        (b"a: !secret x\n", "line 1"),
        (b"a: 1\n---\nb: 2\n", "line 2"),
        (b"a: \xff\n", "not YAML"),
        (b"a: \x01\n", "not YAML"),
        (b"a: " + b"[" * 5000, "nested|line|not YAML"),
        (b"a: " + b"9" * 5000, "line 1: a number has more than 100 digits"),
        (b"? [1, 2]\n: a\n", "not YAML|line 1"),
        (b"? {b: 1}\n: a\n", "not YAML|line 1"),
        (b'a: !!int ""\n', "not YAML"),
        (b"a: !!bool perhaps\n", "not YAML"),
        (b"a: !!timestamp never\n", "not YAML"),
        (b"a: 2001-99-99\n", "not YAML"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(tmp_path: Path, text: bytes, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path)
    assert caught.value.message.startswith(f"{path}:") and "\n" not in caught.value.message


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"larger than {MAX_FILE} bytes"):
        read_yaml(write(tmp_path, b"#" * (MAX_FILE + 1)))


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        read_yaml(tmp_path / name)


PIECES = st.sampled_from(
    ["a", ": ", "- ", "\n", "  ", "[", "]", "{", "}", "? ", "!!int ", "!!binary ", "!!set ", "<<", "*a", "&a ", "|",
     ">", "'", '"', "#", "---", "1", "~", ",", "\t", "%YAML 1.1\n", "!!float ", "!!omap ", "!!pairs ", "0x", ":60", "="]
)  # fmt: skip


@given(st.lists(PIECES, max_size=15))
def test_hostile_yaml_is_only_refused(pieces: list[str]) -> None:
    try:
        assert isinstance(parse_yaml("".join(pieces).encode(), "test"), dict)
    except ConfigError as error:
        assert error.message.startswith("test:")
