"""The log file of a daemon, whose standard output and error go there as well."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

from mms.logs import close_model_log, model_logger, open_model_log

DAEMON = """
import logging, sys
from pathlib import Path
from mms import logs

logs.setup("info", Path(sys.argv[1]), 1000)
for number in range(20):
    logging.getLogger("mms.test").info("line %d of some hundred bytes, so that the file is rotated", number)
print("printed", flush=True)
"""


def test_what_a_daemon_prints_follows_its_log_when_that_is_rotated(tmp_path: Path) -> None:
    log = tmp_path / "mms.log"
    with log.open("ab") as output:
        subprocess.run([sys.executable, "-c", DAEMON, str(log)], stdout=output, stderr=output, check=True, timeout=20)
    assert log.read_text().endswith("printed\n")
    assert {path.name for path in tmp_path.iterdir()} == {"mms.log", "mms.log.1"}
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= 1010


def test_f105_the_logger_of_a_model_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    open_model_log(tmp_path, "a.model")
    logger = weakref.ref(model_logger("a.model"))
    close_model_log("a.model")
    assert logger() is None
