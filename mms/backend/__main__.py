"""`python -m mms.backend`: a worker in a fresh interpreter, or one request run in the foreground for a debugger."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

import msgspec

from mms import wire
from mms.archive import ModelArchive
from mms.backend import loop, process, timeslice
from mms.backend.answers import Body
from mms.backend.loader import load_handler
from mms.backend.streams import Stream
from mms.errors import ArchiveError, MMSError
from mms.handler import Request, Requests


def main() -> None:
    """Runs in the worker process, or in a developer's terminal."""
    parser = argparse.ArgumentParser(prog="python -m mms.backend", description=__doc__)
    parser.add_argument("--channel", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--page", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--server", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", default="", help=argparse.SUPPRESS)
    parser.add_argument("--sandbox", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--interpreter", default="", help=argparse.SUPPRESS)
    parser.add_argument("--settled", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--archive", type=Path, help="the folder of an extracted archive")
    parser.add_argument("--request", type=Path, help="a file that is sent as the body")
    parser.add_argument("--content-type", default="application/octet-stream")
    arguments = parser.parse_args()
    if arguments.channel is None:
        if arguments.archive is None or arguments.request is None:
            parser.error("--archive and --request are needed")
        try:
            load, body = load_of(arguments.archive), arguments.request.read_bytes()
        except MMSError as error:
            parser.exit(2, f"{parser.prog}: error: {error.message}\n")
        except OSError as error:
            parser.exit(2, f"{parser.prog}: error: {error.filename}: {error.strerror}\n")
        sys.exit(run_once(load, body, arguments.content_type))
    if arguments.settled:
        process.set_name(arguments.name)
    else:
        timeslice.take(timeslice.LONG)  # forked workers have the fork server's
        process.settle_in(
            server=arguments.server,
            name=arguments.name,
            directory=os.getcwd(),
            keep=(arguments.channel, arguments.page),
            scratch=arguments.scratch,
            box=msgspec.json.decode(arguments.sandbox, type=wire.Sandbox),
        )
    if arguments.interpreter:
        # only now: an archive's own Python runs what its packages left for the start
        channel = ("--channel", str(arguments.channel), "--page", str(arguments.page))
        words = ("-P", "-m", "mms.backend", "--settled", *channel, "--name", arguments.name)
        os.execv(arguments.interpreter, (arguments.interpreter, *words))
    loop.main(socket.socket(fileno=arguments.channel), arguments.page)


def load_of(directory: Path) -> wire.Load:
    """What the server would tell its worker. Raises ArchiveError and ConfigError."""
    from mms.model_settings import ModelSettings, merge_settings  # workers do without
    from mms.safe_yaml import read_yaml

    if not directory.is_dir():
        raise ArchiveError(f"{directory} is no folder; model-archiver --archive-format no-archive makes one")
    manifest = ModelArchive.open(directory).manifest
    model_config = read_yaml(directory / manifest.config_file) if manifest.config_file else {}
    settings = merge_settings(ModelSettings(), model_config, manifest.config_file, strict=False)
    return wire.Load(
        model_name=manifest.model_name,
        version=manifest.version,
        directory=str(directory.absolute()),
        handler=manifest.handler,
        manifest=dict(manifest.raw),
        model_config=model_config,
        batch_size=settings.batch_size,
        isolate_errors=settings.isolate_errors,
        gpu=None,
        cpu_threads=settings.cpu_threads or os.cpu_count() or 1,
        max_request_size=1 << 30,
        max_response_size=1 << 30,
        threads=settings.threads,
    )


def run_once(load: wire.Load, body: bytes, content_type: str) -> int:
    """Load the archive in this process and run one request, so that a debugger sees it all."""
    os.chdir(load.directory)
    stages = load_handler(load)
    facts = wire.RequestFactsView(content_type, "", b"", False, wire.EMPTY_HEADERS)
    request = Request(facts, b"debug", bytearray(body), load.max_request_size)
    (outcome,), (answer,) = stages.run(Requests.made([request]))
    if isinstance(answer, Stream):
        outcome, answer = answer.drain(_print)
    sys.stderr.write(f"{outcome.status} {outcome.error}\n{outcome.head.decode('latin-1')}\n")
    sys.stdout.buffer.write(bytes(answer) + b"\n")
    return 0 if outcome.status < 400 else 1


def _print(chunk: Body) -> None:
    sys.stdout.buffer.write(bytes(chunk))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
