"""Archives from other machines into the model store: only from allowed places, only to allowed addresses. aiohttp.

Everything is decided before a byte is asked for, again at each redirect, and about the address at the very moment of
connecting to it, so that a name which resolves differently the second time gains nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from mms.config import Config
from mms.errors import BadRequestError, ConflictError, DownloadError
from mms.models.store import ModelStore
from mms.setting import origin_of

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from yarl import URL

MAX_REDIRECTS = 3
PARALLEL = 2
CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 60.0
CHUNK = 1 << 18

_SCHEMES = ("http://", "https://")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}(?:\.mar|\.tar\.gz|\.tgz)")
_PREFIX = ".download-"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_remote(url: str) -> bool:
    """Whether it names something that would have to be downloaded."""
    return url.lower().startswith(_SCHEMES)


def split_pin(url: str) -> tuple[str, str]:
    """The address and the hash in `https://host/cat.mar#sha256=...`. Raises BadRequestError for any other fragment."""
    address, _, fragment = url.partition("#")
    if fragment and not fragment.startswith("sha256="):
        raise BadRequestError(f"cannot load {_shown(url)}: after # only sha256=... is understood")
    return address, fragment.removeprefix("sha256=")


class Downloads:
    """Fetches archives into the store."""

    def __init__(self, config: Config, store: ModelStore) -> None:
        self._store = store
        self._allowed = set(config.allowed_urls)
        self._networks = [ipaddress.ip_network(network) for network in config.allowed_networks]
        self._max_size = config.max_download_size
        self._timeout = config.download_timeout
        self._turns = asyncio.Semaphore(PARALLEL)

    def check(self, url: str) -> str:
        """The name that the file will have in the store. Raises BadRequestError if it may not be downloaded."""
        if not self._allowed:
            raise BadRequestError(
                f"cannot load {_shown(url)}: archives are taken from the model store only, name a file in it "
                "(allowed_urls lists the places that archives may be downloaded from, and is empty)"
            )
        self._check_place(url)
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        if not _FILE_NAME.fullmatch(name):
            raise BadRequestError(
                f"cannot load {_shown(url)}: its path must end in a plain file name with .mar, .tar.gz or .tgz"
            )
        return name

    async def fetch(self, url: str, sha256: str = "") -> str:
        """The name in the store of the file at `url`, which must have that SHA-256 if one is given.

        A file of that name with the same bytes is used as it is. With a hash there is no download then, and no look at
        the bytes either: `ModelStore.open` compares the hash with what it opens. Raises BadRequestError, ConflictError
        (there is another file of that name), DownloadError or ArchiveError; whatever happens, the store then holds the
        whole file or nothing of it.
        """
        name, folder = self.check(url), self._store.folder()
        target = folder / name
        if sha256 and target.exists():
            return name
        async with self._turns:
            with _temporary(folder) as file:
                try:
                    async with asyncio.timeout(self._timeout):
                        digest = await self._receive(url, file)
                except TimeoutError:
                    raise DownloadError(f"{_shown(url)} took longer than {self._timeout:g} s") from None
                if sha256 and digest != sha256:
                    raise DownloadError(f"{_shown(url)} has SHA-256 {digest}, not the one that was asked for")
                await asyncio.to_thread(self._take_in, file, target, digest)
        return name

    async def _receive(self, url: str, file: IO[bytes]) -> str:
        import aiohttp

        connector = aiohttp.TCPConnector(socket_factory=self._connect, use_dns_cache=False)
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
        try:
            # what is asked for is bytes as they are: an encoded answer could unpack to anything
            async with aiohttp.ClientSession(
                connector=connector,
                timeout=timeout,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity"},
            ) as session:
                return await self._follow(session, url, file)
        except aiohttp.ClientError as error:
            raise DownloadError(f"{_shown(url)} cannot be downloaded: {_reason(error)}") from None

    async def _follow(self, session: ClientSession, url: str, file: IO[bytes]) -> str:
        from yarl import URL

        place = URL(url)
        for _ in range(MAX_REDIRECTS + 1):
            self._check_place(str(place))
            async with session.get(place, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                    place = _joined(place, response.headers["Location"])
                    continue
                if response.status != 200:
                    raise DownloadError(f"{_shown(url)} cannot be downloaded: the answer was {response.status}")
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise DownloadError(f"{_shown(url)} cannot be downloaded: its answer has a Content-Encoding")
                return await self._store_body(url, response.content.iter_chunked(CHUNK), response.content_length, file)
        raise DownloadError(f"{_shown(url)} was redirected more than {MAX_REDIRECTS} times")

    async def _store_body(self, url: str, chunks: Any, length: int | None, file: IO[bytes]) -> str:
        digest, size = hashlib.sha256(), length or 0
        if size <= self._max_size:
            size = 0
            async for chunk in chunks:
                size += len(chunk)
                if size > self._max_size:
                    break
                await asyncio.to_thread(_append, file, digest, chunk)
        if size > self._max_size:
            raise DownloadError(f"{_shown(url)} is larger than max_download_size ({self._max_size} bytes)")
        return digest.hexdigest()

    def _take_in(self, file: IO[bytes], target: Path, digest: str) -> None:
        """Check it as the store would, then give it its name, never in the place of another file."""
        try:
            file.flush()
            os.fsync(file.fileno())
            self._store.check(Path(file.name), target.name)
            try:
                os.link(file.name, target)
            except FileExistsError:
                if not target.is_file() or _sha256(target) != digest:
                    raise ConflictError(
                        f"the model store holds another {target.name} already; register that one by its name, "
                        "or remove it"
                    ) from None
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise DownloadError(f"{target.name} cannot be written to the model store: {error.strerror}") from None

    def _check_place(self, url: str) -> None:
        """Scheme, host and port as parsed, against the list. Raises BadRequestError."""
        try:
            parts = urlsplit(url)
            origin = origin_of(url)
            plain = parts.username is None and parts.password is None
        except ValueError:
            origin, plain = "", False
        if not plain and origin:
            raise BadRequestError(f"cannot load {_shown(url)}: credentials in addresses (user:password@) are not taken")
        if not plain or origin not in self._allowed:
            raise BadRequestError(
                f"cannot load {_shown(url)}: {origin or 'that'} is none of allowed_urls ({', '.join(self._allowed)})"
            )

    def _connect(self, info: Any) -> socket.socket:
        """The socket for the address that is connected to next. Raises BadRequestError if that is a private one."""
        family, kind, protocol, _, target = info
        address = ipaddress.ip_address(target[0].partition("%")[0])
        if not _is_public(address) and not any(address in network for network in self._networks):
            raise BadRequestError(
                f"refused to connect to {address}, which is no public address; allowed_networks can name its network"
            )
        return socket.socket(family, kind, protocol)


def _is_public(address: _Address) -> bool:
    """Also of the IPv4 address that an IPv6 one stands for."""
    inner = None
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return _is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _joined(place: URL, location: str) -> URL:
    from yarl import URL

    try:
        return place.join(URL(location)).with_fragment(None)
    except ValueError:
        raise DownloadError("the server redirects to what is no address") from None


def _shown(url: str) -> str:
    """The address without what may be secret in it: user, password, query."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])[:200]


def _reason(error: Exception) -> str:
    """What went wrong, but not in the library's words: they have the address with its query, or a redirect's."""
    words = error.strerror if isinstance(error, OSError) else ""
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _append(file: IO[bytes], digest: Any, chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise DownloadError(f"the model store cannot be written: {error.strerror}") from None
    digest.update(chunk)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[IO[bytes]]:
    """A file that is gone at the end; one that a killed server left is removed when the next download begins."""
    for left in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), left.open("rb") as stale:
            fcntl.flock(stale, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by whoever still writes it
            left.unlink()
    try:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=_PREFIX, delete=False)  # noqa: SIM115  # closed below: `with file`
    except OSError as error:
        raise DownloadError(f"the model store cannot be written: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
        finally:
            Path(file.name).unlink(missing_ok=True)
