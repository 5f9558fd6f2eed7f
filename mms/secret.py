"""Files that nobody but the user of this process may read: tokens and private keys. stdlib only."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mms.errors import ConfigError


def read_secret(path: Path, what: str, limit: int) -> bytes:
    """At most `limit` bytes of the file; `what` it is stands in errors. Raises ConfigError if it is no secret."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise ConfigError(f"the {what} {path} is not a plain file")
            if facts.st_mode & 0o077:
                raise ConfigError(
                    f"the {what} {path} has mode {facts.st_mode & 0o777:o}: others may read it; chmod 600 it"
                )
            if facts.st_uid not in (0, os.geteuid()):
                raise ConfigError(f"the {what} {path} belongs to another user")
            return file.read(limit)
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}: {error.strerror}") from None
