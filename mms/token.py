"""The token of the management API: how its file must look. Read by the server and by the command line; stdlib only."""

from __future__ import annotations

import hmac
import logging
import re
from pathlib import Path

from mms.errors import ConfigError
from mms.secret import read_secret

MAX_FILE = 4096
_TOKEN = re.compile(rb"[\x21-\x7e]{22,512}")  # 22 characters of base64 are 128 bits

log = logging.getLogger("mms.management")


def read_token(path: Path) -> bytes:
    """The token in the file. Raises ConfigError if there is none, or if it is no secret: other users may read it."""
    token = read_secret(path, "token file", MAX_FILE + 1).strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"the token file {path} must hold one word of 22 to 512 characters; `openssl rand -hex 32` makes a good one"
        )
    return token


class TokenFile:
    """The token that is in the file now: a file that is replaced while the server runs counts at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._look()
        self._token: bytes | None = read_token(path)

    def matches(self, given: bytes) -> bool:
        """Whether that is the token; how long the answer takes tells nothing about it."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp, self._token = stamp, self._reread()
        return self._token is not None and hmac.compare_digest(given, self._token)

    def _reread(self) -> bytes | None:
        """None, and nobody is let in, while the file is missing or unsafe."""
        try:
            return read_token(self._path)
        except ConfigError as error:
            log.error("%s; until that is mended, every management call is refused", error.message)
            return None

    def _look(self) -> tuple[int, ...]:
        try:
            facts = self._path.stat()
        except OSError:
            return ()
        return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
