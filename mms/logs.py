"""Logging of the server process: one format, to standard error or a file; a file per model for its workers' output."""

from __future__ import annotations

import logging
import logging.handlers
import os
import time
from pathlib import Path

MAX_BYTES = 100 << 20
RUN_DIR_BYTES = 10 << 20  # of a log in the run directory, which is often in memory
_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_MODELS = logging.getLogger("mms.model")  # made here: without it, logging would remember each child of that name
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(9), *range(10, 32), *range(127, 160), 0x2028, 0x2029)}


class _Formatter(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line whatever the message holds: what a client or a handler wrote must not pass for a line of ours."""
        return super().formatMessage(record).translate(_ESCAPED)


class _RotatingFile(logging.handlers.RotatingFileHandler):
    """Takes standard output and error along when they write to the same file, as those of a daemon do."""

    def doRollover(self) -> None:
        before = os.stat(self.baseFilename)
        same = [descriptor for descriptor in (1, 2) if os.path.samestat(os.fstat(descriptor), before)]
        super().doRollover()
        stream = self.stream
        if stream is not None:
            for descriptor in same:
                os.dup2(stream.fileno(), descriptor)


def setup(level: str, file: Path | None, max_bytes: int = MAX_BYTES) -> None:
    """Configure the `mms` loggers. Raises OSError when the file cannot be written."""
    handler: logging.Handler = logging.StreamHandler()
    if file is not None:
        handler = _RotatingFile(file, maxBytes=max_bytes, backupCount=1)
    handler.setFormatter(_Formatter(_FORMAT))
    logger = logging.getLogger("mms")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logging.getLogger("asyncio").handlers[:] = [handler]
    logging.raiseExceptions = False  # a full disk must not turn log calls into noise


def show_models_only() -> None:
    """What the models' workers print goes to standard error as it is, with warnings but without the pools' reports."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.getLogger("mms").handlers[:] = [handler]
    _MODELS.setLevel(logging.INFO)
    logging.getLogger("mms.pool").setLevel(logging.CRITICAL)


def model_logger(name: str) -> logging.Logger:
    """The log of one model's workers; dots in the name would make it another model's child."""
    return logging.getLogger(f"mms.model.{name.replace('.', '%2E')}")


def open_model_log(folder: Path, name: str) -> None:
    """Write the model's log to `folder`/NAME.log as well. Raises OSError."""
    logger = model_logger(name)
    if logger.handlers:
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(
        folder / f"{name}.log", maxBytes=RUN_DIR_BYTES, backupCount=1, delay=True
    )
    handler.setFormatter(_Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)


def close_model_log(name: str) -> None:
    """Write the model's log no more, and forget its logger, as others may come under ever new names.

    What its workers still say goes to the server's log alone.
    """
    logger = model_logger(name)
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logging.Logger.manager.loggerDict.pop(logger.name, None)
