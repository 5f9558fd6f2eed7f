"""`mms start --daemon`: the process that starts the server in the background, and what that server tells it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import click

from mms.config import Config
from mms.errors import StartError
from mms.rundir import RunDirectory

_READY_FD = "_MMS_READY_FD"
_LAST_WORDS = ("ready", "mms: error")


def was_started_as_daemon() -> bool:
    """Whether this process is the server that `start_daemon` has started."""
    if _READY_FD not in os.environ:
        return False
    os.set_inheritable(int(os.environ[_READY_FD]), False)  # nginx would hold it open for its whole life
    return True


def tell_parent(text: str) -> None:
    """The `mms start --daemon` that waits for the ready line or an error, if this process was started by one."""
    descriptor = os.environ.get(_READY_FD)
    if descriptor is None:
        return
    with contextlib.suppress(BrokenPipeError):
        os.write(int(descriptor), f"{text}\n".encode())
    if text.startswith(_LAST_WORDS):
        del os.environ[_READY_FD]
        os.close(int(descriptor))


def daemon_log(config: Config) -> Path:
    """Where a server in the background logs, unless its settings say otherwise."""
    return RunDirectory(config.run_dir).logs / "mms.log"


def start_daemon(config: Config) -> NoReturn:
    """Start the same command in a session of its own, pass on its ready line or its error, and exit.

    Raises StartError.
    """
    log_file = config.log_file or daemon_log(config)
    try:
        RunDirectory(config.run_dir).prepare()
        log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_file.touch()
    except OSError as error:
        raise StartError(f"cannot write the log {log_file}: {error.strerror}") from None
    read_end, write_end = os.pipe()
    words = [word for word in sys.argv[1:] if word != "--daemon"]
    with log_file.open("ab") as output:
        subprocess.Popen(
            [sys.executable, "-P", "-m", "mms.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(write_end,),
            start_new_session=True,
            env={**os.environ, _READY_FD: str(write_end)},
        )
    os.close(write_end)
    with open(read_end) as lines:
        for text in map(str.rstrip, lines):
            if text.startswith("ready"):
                click.echo(f"{text}; log {log_file}")
                sys.exit(0)
            click.echo(text, err=True)
            if text.startswith(_LAST_WORDS):
                sys.exit(1)
    raise StartError(f"the server ended before it was ready; see {log_file}")
