"""What the rendered configuration says, and what it must never say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from mms_nginx import Listener, render
from mms_nginx.check import listen_addresses, socket_address, worker_count

from mms.http.response import json_body

DIRECTORY = Path("/run/mms")
INFERENCE = Listener("inference", "127.0.0.1:8080", (Path("/run/mms/inference.sock"),))
MANAGEMENT = Listener("management", "127.0.0.1:8081", (Path("/run/mms/management.sock"),))

# Directives with a history of holes, or that serve or run what is on the disk: none is needed to pass requests on.
SCRIPTS = {"rewrite", "map", "if", "set", "include", "load_module", "perl", "js_import", "ssi", "sub_filter"}
FILES = {"root", "alias", "try_files", "slice", "mp4", "autoindex", "dav_methods", "charset_map"}
PROTOCOLS = {"http2", "http3", "quic", "scgi_pass", "uwsgi_pass", "fastcgi_pass", "proxy_set_body"}


def rendered(
    *listeners: Listener,
    user: str | None = None,
    log_level: str = "info",
    access_log: Path | None = None,
    **timeouts: float,
) -> str:
    durations = {"response_timeout": 120.0, "body_timeout": 60.0, "header_timeout": 10.0, **timeouts}
    return render(
        listeners or (INFERENCE, MANAGEMENT),
        directory=DIRECTORY,
        max_request_size=1000,
        user=user,
        log_level=log_level,
        access_log=access_log,
        response_timeout=durations["response_timeout"],
        body_timeout=durations["body_timeout"],
        header_timeout=durations["header_timeout"],
    )


def block(text: str, opening: str) -> str:
    """The top-level block of `http` that starts with the line."""
    start = text.index(f"    {opening} {{")
    return text[start : text.index("\n    }", start)]


def test_s20_no_dangerous_directive() -> None:
    directives = set(re.findall(r"^\s*([a-z0-9_]+)\b", rendered(), re.MULTILINE))
    assert directives & (SCRIPTS | FILES | PROTOCOLS) == set()


def test_s20_no_regular_expression_and_no_capture() -> None:
    text = rendered()
    assert re.search(r"location\s+~|server_name\s+~|\$\d", text) is None


def test_the_inference_server_knows_only_its_own_upstream() -> None:
    text = rendered()
    servers = text.split("    server {")[1:]
    assert len(servers) == 2
    assert "mms_inference" in servers[0] and "mms_management" not in servers[0].split("upstream")[0]
    assert "mms_management" in servers[1] and "mms_inference" not in servers[1]
    assert "management.sock" not in block(text, "upstream mms_inference")


def test_limits_and_times_come_from_the_arguments() -> None:
    text = rendered(response_timeout=90.0, body_timeout=1.5, header_timeout=0.25)
    assert "client_max_body_size 1000;" in text
    assert "proxy_read_timeout 120000ms;" in text
    assert "client_body_timeout 1500ms;" in text
    assert "client_header_timeout 250ms;" in text


def test_upstream_connections_are_kept_and_posts_never_repeated() -> None:
    text = rendered()
    assert re.search(r"keepalive \d{2,};", text)
    assert 'proxy_set_header Connection "";' in text and "proxy_http_version 1.1;" in text
    assert "proxy_next_upstream error;" in text and "non_idempotent" not in text


def test_user_is_named_only_when_there_is_one() -> None:
    assert "user nobody;" in rendered(user="nobody")
    assert not re.search(r"^user ", rendered(), re.MULTILINE)


@pytest.mark.parametrize("log_level", ["info", "warning", "error"])
def test_error_log_stays_above_the_levels_that_quote_requests(log_level: str) -> None:
    assert "error_log stderr crit;" in rendered(log_level=log_level)


def test_there_is_no_access_log_unless_one_is_named() -> None:
    assert "access_log off;" in rendered() and "log_format" not in rendered()


def test_access_log_has_no_query_header_or_body() -> None:
    text = rendered(access_log=Path("/logs/a b.log"))
    assert 'access_log "/logs/a b.log" mms' in text
    format_ = text[text.index("log_format") : text.index("access_log")]
    assert set(re.findall(r"\$\w+", format_)) == {
        "$time_iso8601",
        "$server_name",
        "$remote_addr",
        "$request_method",
        "$uri",
        "$status",
        "$bytes_sent",
        "$request_time",
        "$upstream_response_time",
        "$upstream_http_x_request_id",
    }


def test_errors_are_json_of_the_known_shape() -> None:
    bodies = re.findall(r'return (\d+) "((?:[^"\\]|\\.)*)"', rendered())
    assert {status for status, _ in bodies} >= {"400", "404", "413", "414", "502", "504"}
    for status, body in bodies:
        assert body.endswith("\\n") and "\\n" not in body[:-2]
        text = re.sub(r"\\(.)", r"\1", body.removesuffix("\\n"))
        answer = json.loads(text)
        assert answer.keys() == {"code", "type", "message"} and answer["code"] == int(status)
        assert text.encode() + b"\n" == json_body(answer)


def test_a_worker_for_each_front_end_and_one_more_for_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    sockets, tls = tuple(Path(f"/{number}.sock") for number in range(8)), (Path("/cert"), Path("/key"))
    count = {
        (many, bool(pair)): worker_count(rendered(Listener("inference", "[::]:80", sockets[:many], pair)))
        for many in (1, 2, 8)
        for pair in (None, tls)
    }
    assert count == {(1, False): 1, (1, True): 2, (2, False): 2, (2, True): 3, (8, False): 4, (8, True): 4}


def test_upstream_of_several_front_ends() -> None:
    two = Listener("inference", "[::]:80", (Path("/a b/1.sock"), Path("/a/2.sock")))
    text = rendered(two)
    assert 'server "unix:/a b/1.sock" max_fails=0;' in text and 'server "unix:/a/2.sock" max_fails=0;' in text


@pytest.mark.parametrize(
    "address", ["127.0.0.1:80", "[::1]:80", "unix:/tmp/a b.sock", 'unix:/tmp/quote".sock', "*:8080"]
)
def test_addresses_can_be_read_back(address: str) -> None:
    assert listen_addresses(rendered(Listener("inference", address, (Path("/x.sock"),)))) == [address]


@pytest.mark.parametrize(
    ("address", "target"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:80", ("::1", 80)), ("unix:/a", "/a"), ("*:1", ("0.0.0.0", 1))],
)
def test_socket_address(address: str, target: str | tuple[str, int]) -> None:
    assert socket_address(address)[1] == target
