"""The edge's whole configuration as text, made in the server process and of nothing but its arguments and limits."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

MAX_CONNECTIONS = 20_480  # of all workers together
READ_MARGIN = 30.0

# For TLS 1.2: forward secrecy and authenticated encryption only. Those of TLS 1.3 are all good.
_CIPHERS = ":".join(
    f"ECDHE-{key}-{cipher}"
    for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    for key in ("ECDSA", "RSA")
)

# Below crit nginx quotes request lines, and with them query strings, in its error log.
_ERROR_LEVELS = {"debug": "info", "info": "crit", "warning": "crit", "error": "crit"}


@dataclass(frozen=True)
class Listener:
    """One public address and the front ends' sockets behind it; `tls` is certificate chain and key."""

    name: str
    address: str
    upstream: tuple[Path, ...]
    tls: tuple[Path, Path] | None = None


@dataclass(frozen=True)
class _Error:
    """An error that nginx answers itself: the codes it catches and the JSON that clients get instead of HTML."""

    caught: tuple[int, ...]
    status: int
    type: str
    message: str
    # A request that could not be parsed has no path yet, and nginx cannot send it to a named location.
    internal: bool = False

    @property
    def location(self) -> str:
        return f"/.mms/{self.status}" if self.internal else f"@{self.status}"

    @property
    def match(self) -> str:
        return f"= {self.location}" if self.internal else self.location

    @property
    def body(self) -> str:
        """As the front end writes its own: without spaces, and ended."""
        error = {"code": self.status, "type": self.type, "message": self.message}
        return json.dumps(error, separators=(",", ":")) + "\n"


def _errors(max_request_size: int) -> list[_Error]:
    too_large = f"the request body is over max_request_size ({max_request_size} bytes)"
    no_path = "Requested resource is not found, please refer to API document."
    no_method = "Requested method is not allowed, please refer to API document."
    no_answer = "the front end did not answer; try again"
    late = "the front end did not answer in time; try again when load is lower"
    return [
        _Error((400, 494), 400, "BadRequestException", "not a valid HTTP request, or its headers are too long", True),
        _Error((497,), 421, "BadRequestException", "this port speaks TLS: use https", True),
        _Error((404,), 404, "ResourceNotFoundException", no_path),
        _Error((405,), 405, "MethodNotAllowedException", no_method),
        _Error((413,), 413, "RequestEntityTooLargeException", too_large),
        _Error((414,), 414, "RequestEntityTooLargeException", "the request line is longer than 8192 bytes", True),
        _Error((500,), 500, "InternalServerException", "the edge could not handle this request"),
        _Error((501,), 501, "BadRequestException", "of Transfer-Encodings only chunked is supported", True),
        _Error((502, 503), 502, "BadGatewayException", no_answer),
        _Error((504,), 504, "DeadlineExceededException", late),
        _Error((505,), 505, "BadRequestException", "this HTTP version is not supported; use HTTP/1.1", True),
    ]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _time(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def _processes(listeners: Sequence[Listener]) -> int:
    """How many workers: as many as front ends, since one keeps up with one, and one more if TLS is spoken.

    With more, each finds less to do whenever it looks: two cost a request a tenth more than one.
    """
    front_ends = max(len(listener.upstream) for listener in listeners)
    tls = any(listener.tls for listener in listeners)
    return min(front_ends + tls, os.cpu_count() or 1)


def _limits(processes: int) -> tuple[int, int]:
    """Descriptors and connections of one nginx worker: a request takes two connections and may spool to two files."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 2 * MAX_CONNECTIONS // processes
    descriptors = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    return descriptors, descriptors // 2


def _template() -> jinja2.Template:
    import jinja2  # takes 25 ms, which a server without nginx need not wait for

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mms_nginx", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quoted"] = _quoted
    return environment.get_template("template.conf.j2")


def render(
    listeners: Sequence[Listener],
    *,
    directory: Path,
    max_request_size: int,
    user: str | None,
    response_timeout: float,
    body_timeout: float,
    header_timeout: float,
    log_level: str,
    spool: Path | None = None,
    access_log: Path | None = None,
) -> str:
    """The file for an nginx in `directory`; `response_timeout` is the longest that the front end may take to answer.

    Bodies that do not fit into memory are spooled to `spool`, or to `directory`.
    """
    processes = _processes(listeners)
    descriptors, connections = _limits(processes)
    return _template().render(
        listeners=listeners,
        directory=directory,
        spool=spool or directory,
        access_log=str(access_log) if access_log else None,
        errors=_errors(max_request_size),
        max_request_size=max_request_size,
        user=user,
        error_level=_ERROR_LEVELS[log_level],
        processes=processes,
        descriptors=descriptors,
        connections=connections,
        read_timeout=_time(response_timeout + READ_MARGIN),
        body_timeout=_time(body_timeout),
        header_timeout=_time(header_timeout),
        ciphers=_CIPHERS,
    )
