"""The tokens of the two APIs: where they come from and how they must look. Server and command line; stdlib only."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from mms.errors import ConfigError
from mms.secret import read_secret

MAX_FILE = 4096
VARIABLES = {"management": "MMS_MANAGEMENT_TOKEN", "inference": "MMS_INFERENCE_TOKEN"}
_TOKEN = re.compile(rb"[\x21-\x7e]{22,512}")  # 22 characters of base64 are 128 bits

log = logging.getLogger("mms.token")


def read_token(path: Path) -> bytes:
    """The token in the file. Raises ConfigError if there is none, or if it is no secret: other users may read it."""
    return _checked(read_secret(path, "token file", MAX_FILE + 1).strip(), f"the token file {path}")


def find_token(api: str, file: str, environ: Mapping[str, str]) -> bytes:
    """The token that the command line brings: of the server's token file, or else of the variable; or nothing.

    Raises ConfigError.
    """
    if file:
        return read_token(Path(file))
    given = environ.get(VARIABLES[api], "")
    return _given(api, given) if given else b""


def take_token(api: str, file: Path | None, environ: MutableMapping[str, str]) -> Token | None:
    """What an API wants to see, if anything: of its file, or of its variable, which nobody finds in `environ` any more.

    Raises ConfigError.
    """
    variable = VARIABLES[api]
    given = environ.pop(variable, "")
    if given and file is not None:
        raise ConfigError(f"environment: {variable} is set, and {api}_token_file as well; take one of them away")
    if given:
        return Token(_given(api, given))
    return None if file is None else TokenFile(file)


def _given(api: str, text: str) -> bytes:
    return _checked(text.encode("utf-8", "surrogateescape"), f"environment: {VARIABLES[api]}")


def _checked(token: bytes, where: str) -> bytes:
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{where} must hold one word of 22 to 512 characters; `openssl rand -hex 32` makes a good one"
        )
    return token


class Token:
    """What a caller has to know. `changes` counts how often it has become another one."""

    changes = 0

    def __init__(self, token: bytes | None) -> None:
        self._token = token

    def admits(self, authorization: Sequence[bytes]) -> bool:
        """Whether these are the Authorization headers of a call that brings the token."""
        scheme, _, word = authorization[0].partition(b" ") if len(authorization) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and self.matches(word.strip())

    def matches(self, given: bytes) -> bool:
        """Whether that is the token; how long the answer takes tells nothing about it."""
        self.refresh()
        return self._token is not None and hmac.compare_digest(given, self._token)

    def refresh(self) -> None:
        """Look whether it has changed."""


class TokenFile(Token):
    """The token that is in the file now: a file that is replaced while the server runs counts at once.

    The constructor raises ConfigError; without `read` it does not, and the file is read when it is first needed.
    """

    def __init__(self, path: Path, *, read: bool = True) -> None:
        self._path = path
        self._stamp = self._look() if read else None
        super().__init__(read_token(path) if read else None)

    def refresh(self) -> None:
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp, self._token = stamp, self._reread()
            self.changes += 1

    def _reread(self) -> bytes | None:
        """None, and nobody is let in, while the file is missing or unsafe."""
        try:
            return read_token(self._path)
        except ConfigError as error:
            log.error("%s; until that is mended, every call that needs it is refused", error.message)
            return None

    def _look(self) -> tuple[int, ...]:
        try:
            facts = self._path.stat()
        except OSError:
            return ()
        return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
