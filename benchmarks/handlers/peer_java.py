"""What the launchers of Multi Model Server and TorchServe share. Not with their usual logs: a tenth of their cost."""

import os
import subprocess
import sys
from pathlib import Path

BATCH, DELAY_MS, PORT = (int(os.environ[f"PEER_{name}"]) for name in ("BATCH", "DELAY_MS", "PORT"))
MORE_PORTS = os.environ["PEER_MORE_PORTS"].split(",")
BIN = Path(sys.executable).parent
HANDLERS = Path(__file__).parent
QUIET = """<Configuration status="ERROR"><Appenders><Console name="c"><PatternLayout pattern="%p %c %m%n"/></Console>
</Appenders><Loggers><Root level="warn"><AppenderRef ref="c"/></Root></Loggers></Configuration>
"""


def launch(archiver, server, settings):
    """Archives with one command, then becomes the other, with these settings in a file; both in the working folder."""
    Path("store").mkdir()
    subprocess.run([BIN / archiver[0], *archiver[1:], "--model-name", "bench", "--export-path", "store"], check=True)
    Path("log4j2.xml").write_text(QUIET)
    lines = {"model_store": "store", "job_queue_size": 1000, "default_response_timeout": 120, **settings}
    lines["vmargs"] = f"-Djava.io.tmpdir={Path.cwd()}"  # Java knows no TMPDIR, and its sockets and models go there
    Path("config.properties").write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
    program = str(BIN / server[0])
    words = ["--start", "--foreground", "--model-store", "store", "--log-config", "log4j2.xml", *server[1:]]
    os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"  # the front end starts its workers with `python`
    os.execv(program, [program, *words, "config.properties"])
