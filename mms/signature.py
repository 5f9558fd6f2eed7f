"""Signatures of archives: ed25519 over the manifest, which holds the hash of every file, in a DSSE envelope.

Made by `model-archiver sign`, checked by the server and by `model-archiver verify`. Needs the `cryptography` package,
which is imported when a key is used and not before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mms.archive import ModelArchive
from mms.errors import ArchiveError, ConfigError
from mms.secret import read_secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.mms.manifest+json"
MAX_KEY_FILE = 1 << 20
MAX_SIGNATURES = 16

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


def make_keys(private: Path, public: Path) -> str:
    """Write a new pair of keys, the private one for its owner alone; returns the key's id. Raises OSError."""
    ed25519, serialization = _cryptography()
    key = ed25519.Ed25519PrivateKey.generate()
    texts = (
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    )
    for path, mode, text in zip((private, public), (0o600, 0o644), texts, strict=True):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as file:
            file.write(text)
    return _key_id(key.public_key())


class SigningKey:
    """An ed25519 private key from a PEM file, as `openssl genpkey -algorithm ed25519` writes it too."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file holds no such key, or others may read it."""
        ed25519, serialization = _cryptography()
        try:
            key = serialization.load_pem_private_key(read_secret(path, "key", MAX_KEY_FILE), None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} holds no private key that can be used: {error}") from None
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise ConfigError(f"{path} is not an ed25519 key; model-archiver keygen makes one")
        self._key: Ed25519PrivateKey = key
        self.id = _key_id(key.public_key())

    def sign(self, manifest: bytes) -> bytes:
        """The envelope for an archive with this manifest."""
        signature = self._key.sign(_encoding(PAYLOAD_TYPE, manifest))
        envelope = {
            "payloadType": PAYLOAD_TYPE,
            "payload": base64.b64encode(manifest).decode(),
            "signatures": [{"keyid": self.id, "sig": base64.b64encode(signature).decode()}],
        }
        return json.dumps(envelope, indent=2).encode() + b"\n"


class TrustedKeys:
    """The public keys of a file with one or more PEM blocks."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file holds anything but ed25519 public keys, or others may write it."""
        ed25519, serialization = _cryptography()
        data, mode = _read(path)
        if mode & 0o022:
            raise ConfigError(f"the trusted keys {path} have mode {mode:o}: others may change them; chmod 644 it")
        if len(data) > MAX_KEY_FILE or _PEM.sub(b"", data).strip() or not data.strip():
            raise ConfigError(f"{path} must hold public keys (PEM) and nothing else")
        self._keys: dict[str, Ed25519PublicKey] = {}
        for block in _PEM.findall(data):
            try:
                key = serialization.load_pem_public_key(block)
            except ValueError as error:
                raise ConfigError(f"{path} holds a key that cannot be used: {error}") from None
            if not isinstance(key, ed25519.Ed25519PublicKey):
                raise ConfigError(f"{path} holds a key that is not ed25519")
            self._keys[_key_id(key)] = key

    def check(self, archive: ModelArchive) -> str:
        """The id of the trusted key that has signed the archive's manifest. Raises ArchiveError if none has.

        The files are bound by the manifest's hashes: they must be verified as well.
        """
        from cryptography.exceptions import InvalidSignature

        name = archive.name
        if not archive.signature:
            raise ArchiveError(f"{name}: not signed, and only archives signed with a trusted key are taken")
        payload, signatures = _open(name, archive.signature)
        if payload != archive.manifest_bytes:
            raise ArchiveError(f"{name}: its signature is for another manifest")
        if archive.files and not archive.manifest.files:
            raise ArchiveError(f"{name}: its manifest has no hashes, so that its signature says nothing of its files")
        for _, signature in signatures:  # the key id is only a hint, and not signed
            for key_id, key in self._keys.items():
                try:
                    key.verify(signature, _encoding(PAYLOAD_TYPE, payload))
                except InvalidSignature:
                    continue
                return key_id
        known = ", ".join(key_id[:16] for key_id, _ in signatures)
        raise ArchiveError(f"{name}: not signed with a trusted key (its signature names {known or 'no key'})")


def signers(archive: ModelArchive) -> list[str]:
    """The ids of the keys that the signature names; nothing about it is checked. Raises ArchiveError."""
    if not archive.signature:
        return []
    return [key_id for key_id, _ in _open(archive.name, archive.signature)[1]]


def _encoding(kind: str, payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


def _open(name: str, envelope: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    try:
        document = json.loads(envelope)
        kind, payload, entries = document["payloadType"], document["payload"], document["signatures"]
        if kind != PAYLOAD_TYPE or not isinstance(entries, list) or len(entries) > MAX_SIGNATURES:
            raise ValueError
        signatures = [
            (re.sub(r"[^0-9a-zA-Z]", "", str(entry.get("keyid", "")))[:64], _decoded(entry["sig"])) for entry in entries
        ]
        return _decoded(payload), signatures
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ArchiveError(f"{name}: its signature is malformed") from None


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError from error


def _key_id(key: Ed25519PublicKey) -> str:
    _, serialization = _cryptography()
    raw = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(raw).hexdigest()


def _read(path: Path) -> tuple[bytes, int]:
    """The file's content, cut off if it is too large for a key, and its permissions."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_FILE + 1), stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise ConfigError(f"cannot read the key {path}: {error.strerror}") from None


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError("signatures need the cryptography package: pip install 'mms-server[sign]'") from None
    return ed25519, serialization
