"""The `mms` command. Options are made from the fields of Config; a command imports the heavy modules that it needs."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

import mms
from mms.config import Config, load_config
from mms.daemon import daemon_log, start_daemon, tell_parent, was_started_as_daemon
from mms.errors import MMSError
from mms.instances import parse_instances
from mms.program import Program
from mms.rundir import RunDirectory, Running
from mms.setting import show_setting
from mms.token import find_token
from mms.workers.forkprocess import ForkProcess

if TYPE_CHECKING:
    from mms.upgrade import Predecessor

NOT_READY = 3
HEARTBEAT = 2.0
RELOAD_TIMEOUT = 30.0
RELOAD_POLL = 0.02

_Command = Callable[..., Any]


def _settings(command: _Command) -> _Command:
    """An option for each setting, and --config."""
    for setting in reversed(fields(Config)):
        flag = "--" + setting.name.replace("_", "-")
        multiple = isinstance(setting.default, tuple) and setting.metadata["parse"] is not parse_instances  # JSON
        command = click.option(
            flag, setting.name, multiple=multiple, default=None, metavar="…", help=setting.metadata["help"]
        )(command)
    return click.option("--config", "file", type=click.Path(path_type=Path), help="settings file (YAML)")(command)


def _load(file: Path | None, options: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    given = {
        name: _listed(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value not in (None, ())
    }
    return load_config(file=file, command_line=given)


def _listed(words: tuple[str, ...]) -> tuple[str, ...]:
    """A list may be given in one word with commas; spaces may be part of a path."""
    return tuple(part.strip() for word in words for part in word.split(",") if part.strip())


@click.group("mms", cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(mms.__version__, prog_name="mms")
def main() -> None:
    """Serve model archives: batching, versions, worker pools and metrics behind nginx."""
    _open_standard_streams()


def _open_standard_streams() -> None:
    """Started with one of them closed, the first socket would get its number, and libuv and children its traffic."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


_fail = main.fail


class _ManyModels(click.Command):
    """Lets `--models a.mar b.mar` take several values, as MMS users type it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        in_models = False
        for word in args:
            if in_models and not word.startswith("-") and spread[-1] != "--models":
                spread.append("--models")
            in_models = (in_models and not word.startswith("-")) or word == "--models"
            spread.append(word)
        return super().parse_args(ctx, spread)


@main.command(cls=_ManyModels)
@click.option("--daemon", is_flag=True, help="return when the server is ready, and leave it running")
@click.option("--foreground", is_flag=True, help="stay in the foreground (the default)")
@click.option("--fresh", is_flag=True, help="forget what was registered: start with what --models names only")
@_settings
def start(daemon: bool, foreground: bool, fresh: bool, file: Path | None, **options: Any) -> None:
    """Start a server and stay in the foreground until Ctrl-C or SIGTERM.

    \b
    mms start --model-store store --models cat.mar
    mms start --model-store store --models ALL --daemon
    """
    is_daemon = was_started_as_daemon()
    # before all else: while it starts, this process has 0.2 s of imports to do
    ahead = None if daemon and not foreground else ForkProcess()
    from mms.upgrade import predecessor

    old = predecessor(os.environ)
    try:
        config, _ = _load(file, options)
        if ahead is None:
            start_daemon(config)
        code = _serve(config, lambda: _load(file, options)[0], old, ahead, fresh=fresh, is_daemon=is_daemon)
    except MMSError as error:
        tell_parent(f"mms: error: {error.message}")
        if old is not None:
            old.failed(error.message)
        raise
    finally:
        if ahead is not None:
            ahead.end()
    sys.exit(code)


def _serve(
    config: Config,
    reread: Callable[[], Config],
    old: Predecessor | None,
    ahead: ForkProcess,
    *,
    fresh: bool,
    is_daemon: bool,
) -> int:
    import uvloop

    from mms import logs
    from mms.server import serve

    is_daemon = is_daemon or (old is not None and old.handover.daemon)

    def say(text: str) -> None:
        _announce(text)
        if old is not None:
            old.progress(text)

    try:
        if is_daemon and config.log_file is None:
            logs.setup(config.log_level, daemon_log(config), logs.RUN_DIR_BYTES)
        else:
            logs.setup(config.log_level, config.log_file)
    except OSError as error:
        _fail(f"cannot write the log {config.log_file}: {error.strerror}")
    return uvloop.run(serve(config, say, fresh=fresh, reread=reread, daemon=is_daemon, old=old, ahead=ahead))


def _announce(text: str) -> None:
    click.echo(text)
    tell_parent(text)


_run_dir_option = click.option(
    "--run-dir", type=click.Path(path_type=Path, readable=False), default=None, help="the server's run directory"
)


def _running(run_dir: Path | None) -> tuple[RunDirectory, Running | None]:
    config, _ = _load(None, {"run_dir": str(run_dir) if run_dir else None})
    directory = RunDirectory(config.run_dir)
    return directory, directory.running()


def _token(api: str, file: str) -> bytes:
    """What that API of the server wants to see, if anything."""
    try:
        return find_token(api, file, os.environ)
    except MMSError as error:
        _fail(error.message, NOT_READY)


def _nobody(directory: RunDirectory) -> str:
    killed = directory.recorded()
    text = f"no server is running in {directory.path}"
    return f"{text}; the last one there (pid {killed.pid}) was killed" if killed else text


@main.command()
@_run_dir_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=None,
    help="seconds to wait before the server is killed (default: what its settings allow for)",
)
def stop(run_dir: Path | None, timeout: float | None) -> None:
    """Stop the server: requests in hand are answered first."""
    directory, running = _running(run_dir)
    if running is None:
        click.echo(_nobody(directory))
        return
    limit = running.stop_limit if timeout is None else timeout
    pidfd = _signal(running, signal.SIGTERM, "stop")
    if not _ended(pidfd, running.pid, limit):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], HEARTBEAT)
        _fail(f"the server (pid {running.pid}) did not stop within {limit:g} s and was killed")
    click.echo(f"stopped the server (pid {running.pid})")


def _signal(running: Running, number: signal.Signals, verb: str) -> int:
    """Send it, or end with the reason why that cannot be; returns the pidfd of the server."""
    try:
        pidfd = os.pidfd_open(running.pid)
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        _fail(f"the server (pid {running.pid}) is not seen from here: it has just ended, or is in another container")
    except PermissionError as error:
        _fail(f"cannot {verb} pid {running.pid}: {error.strerror}")
    return pidfd


def _ended(pidfd: int, pid: int, limit: float) -> bool:
    """Whether the process ends in time; there is a word every two seconds."""
    begun, waited = time.monotonic(), 0.0
    while not select.select([pidfd], [], [], min(HEARTBEAT, limit - waited))[0]:
        waited = time.monotonic() - begun
        if waited >= limit:
            return False
        click.echo(f"waiting for {waited:.0f} s: pid {pid} finishes requests in hand, at most {limit:g} s", err=True)
    return True


@main.command()
@_run_dir_option
def reload(run_dir: Path | None) -> None:
    """Have the server read its settings again; what can change does so at once, and no request is lost."""
    directory, running = _running(run_dir)
    if running is None:
        _fail(_nobody(directory), NOT_READY)
    before = directory.reloaded()
    pidfd = _signal(running, signal.SIGHUP, "reload")
    deadline = time.monotonic() + RELOAD_TIMEOUT
    while (done := directory.reloaded()) is None or done == before:
        if select.select([pidfd], [], [], RELOAD_POLL)[0] or time.monotonic() > deadline:
            _fail(f"the server (pid {running.pid}) did not say that it has reloaded; see its log")
    if done.failure:
        _fail(f"not reloaded, everything stays as it was: {done.failure}")
    click.echo(f"reloaded; changed: {', '.join(done.applied) or 'nothing'}")
    if done.restart:
        click.echo(f"changed by a restart only: {', '.join(done.restart)}")


@main.command()
@_run_dir_option
def upgrade(run_dir: Path | None) -> None:
    """Have a new server take over from the running one, with the code and settings of now; no request is lost."""
    directory, running = _running(run_dir)
    if running is None:
        _fail(_nobody(directory), NOT_READY)
    before = directory.upgraded()
    pidfd = _signal(running, signal.SIGUSR2, "upgrade")
    said = ""
    while True:
        ended = select.select([pidfd], [], [], RELOAD_POLL)[0]
        state = directory.upgraded()
        if state is not None and state != before:
            if state.failure:
                _fail(f"not upgraded, everything stays as it was: {state.failure}")
            if state.progress != said:
                said = state.progress
                click.echo(said, err=True)
            if state.pid not in (0, running.pid):  # what made it the running one has been another upgrade
                click.echo(f"upgraded: pid {state.pid} serves; pid {running.pid} answers what it has in hand and ends")
                return
        if ended:
            _fail(f"the server (pid {running.pid}) has ended before it was upgraded; see its log")


@main.command()
@click.argument("model")
@click.argument("number", metavar="[VERSION]", default="")
@_run_dir_option
def retry(model: str, number: str, run_dir: Path | None) -> None:
    """Start the workers now that MODEL lacks, for instance because it is FAILED (without VERSION: its default one)."""
    from mms.client import send

    directory, running = _running(run_dir)
    if running is None:
        _fail(_nobody(directory), NOT_READY)
    path = "/".join(quote(part, safe="") for part in ("models", model, number, "retry") if part)
    try:
        code, body = send(
            running.management_address,
            "POST",
            f"/{path}",
            token=_token("management", running.management_token_file),
            certificate=running.tls_cert,
        )
    except OSError as error:
        _fail(f"no answer from {running.management_address}: {error}")
    answer = json.loads(body)
    if code >= 400:
        if "traceback" in answer:
            click.echo(answer["traceback"], err=True)
        _fail(answer["message"])
    click.echo(answer["status"])


@main.command()
@_run_dir_option
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
@click.option("--quiet", is_flag=True, help="no output, only the exit code")
def status(run_dir: Path | None, as_json: bool, quiet: bool) -> None:
    """Show the server's models and workers. Exit code 0: all ready, 3: not running or not ready."""
    from mms.client import describe_models

    directory, running = _running(run_dir)
    if running is None:
        if not quiet:
            click.echo('{"running": false}' if as_json else _nobody(directory))
        sys.exit(NOT_READY)
    try:
        token = _token("management", running.management_token_file)
        models = describe_models(running.management_address, token=token, certificate=running.tls_cert)
    except OSError as error:
        _fail(f"the server (pid {running.pid}) does not answer on {running.management_address}: {error}", NOT_READY)
    ready = all(_is_ready(model) for model in models)
    if as_json and not quiet:
        click.echo(json.dumps({"running": True, "ready": ready, "pid": running.pid, "models": models}, indent=2))
    elif not quiet:
        _print_models(running, models)
    sys.exit(0 if ready else NOT_READY)


def _is_ready(model: dict[str, Any]) -> bool:
    up = sum(worker["status"] == "READY" for worker in model["workers"])
    return bool(model["state"] == "READY" and up >= model["minWorkers"])


def _print_models(running: Running, models: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"pid {running.pid}, inference {running.inference_address}", title_justify="left")
    for column in ("model", "version", "default", "state", "workers", "queue", "batch"):
        table.add_column(column)
    for model in models:
        up = sum(worker["status"] == "READY" for worker in model["workers"])
        table.add_row(
            model["modelName"],
            model["modelVersion"],
            "yes" if model["defaultVersion"] else "",
            f"{model['state']}, asleep" if model.get("asleep") else model["state"],
            f"{up} of {model.get('targetWorkers', model['minWorkers'])}",
            f"{model['jobQueueStatus']['pendingRequests']} of {model['queueSize']}",
            str(model["batchSize"]),
        )
    Console().print(table)


@main.command("config", cls=_ManyModels)
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
@_settings
def show_config(as_json: bool, file: Path | None, **options: Any) -> None:
    """Show every setting: its value, where that comes from, and what it means."""
    from rich.console import Console
    from rich.table import Table

    config, origins = _load(file, options)
    rows = [
        (setting.name, show_setting(Config, setting.name, getattr(config, setting.name)), setting.metadata["help"])
        for setting in fields(Config)
    ]
    if as_json:
        document = {name: {"value": value, "origin": origins[name], "help": text} for name, value, text in rows}
        click.echo(json.dumps(document, indent=2))
        return
    table = Table("setting", "value", "from", "meaning")
    for name, value, text in rows:
        table.add_row(name, value, origins[name], text)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@main.command()
@click.argument("archive", type=click.Path(path_type=Path))
@click.argument("request", type=click.Path(path_type=Path), required=False)
@click.option("--content-type", default="", help="of the request (default: from the file's name)")
def check(archive: Path, request: Path | None, content_type: str) -> None:
    """Load ARCHIVE in one worker process, without a server, and run it on the file REQUEST if one is given."""
    from mms import logs
    from mms.trial import run_trial

    logs.show_models_only()
    status, answer = run_trial(archive, request, content_type)
    click.echo(answer)
    sys.exit(0 if status < 400 else 1)


@main.command()
@click.argument("model")
@click.argument("request", type=click.Path(path_type=Path))
@click.option("--content-type", default="", help="of the request (default: from the file's name)")
@click.option("--version", "number", default="", help="a version (default: the default one)")
@_run_dir_option
def predict(model: str, request: Path, content_type: str, number: str, run_dir: Path | None) -> None:
    """Send the file REQUEST to MODEL on the running server and print the answer, a streamed one as it comes."""
    from mms.client import read_request, send

    directory, running = _running(run_dir)
    if running is None:
        _fail(_nobody(directory), NOT_READY)
    content, guessed = read_request(request)
    path = "/".join(quote(word, safe="") for word in (model, number) if word)

    def show(piece: bytes) -> None:
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()

    try:
        code, _ = send(
            running.inference_address,
            "POST",
            f"/predictions/{path}",
            content,
            content_type or guessed,
            token=_token("inference", running.inference_token_file),
            certificate=running.tls_cert,
            show=show,
        )
    except OSError as error:
        _fail(f"no answer from {running.inference_address}: {error}")
    sys.exit(0 if code < 400 else 1)


if __name__ == "__main__":
    main()
