"""S4: signed archives, from the archiver to the server that takes no others."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mms_archiver.cli import cli

from mms.archive import SIGNATURE, ModelArchive
from mms.errors import ArchiveError, ConfigError
from mms.models.store import ModelStore
from mms.signature import SigningKey, TrustedKeys
from tests.asking import fetch
from tests.conftest import MakeArchive
from tests.e2e.test_start_errors import refusal
from tests.servers import scratch, server

HANDLER = "def handle(data, context):\n    return [b'signed'] * len(data or ())\n"


def archiver(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def pack(folder: Path, format: str = "default") -> Path:
    (folder / "handler.py").write_text(HANDLER)
    words = ["--model-name", "cat", "--handler", folder / "handler.py:handle", "--export-path", folder]
    done = archiver(*words, "--archive-format", format)
    assert done.exit_code == 0, done.output
    return folder / {"tgz": "cat.tar.gz", "no-archive": "cat"}.get(format, "cat.mar")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The folder of the key pairs me and other."""
    for name in ("me", "other"):
        assert archiver("keygen", tmp_path / name).exit_code == 0
    return tmp_path


def resign(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the envelope in a zip."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    envelope = json.loads(files[SIGNATURE])
    changed = change(envelope)
    files[SIGNATURE] = json.dumps(envelope if changed is None else changed).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def test_s4_keys_are_made_once_and_private(keys: Path) -> None:
    assert (keys / "me.key").stat().st_mode & 0o777 == 0o600
    again = archiver("keygen", keys / "me")
    assert again.exit_code == 1
    assert "File exists" in again.output


@pytest.mark.parametrize("format", ["default", "zip-store", "tgz", "no-archive"])
def test_s4_every_format_can_be_signed_and_signed_again(keys: Path, format: str) -> None:
    path = pack(keys, format)
    before = ModelArchive.open(path)
    for name in ("other", "me"):
        done = archiver("sign", path, "--key", keys / f"{name}.key")
        assert done.exit_code == 0, done.output
    signed = ModelArchive.open(path)
    assert (signed.format, signed.stored, signed.files) == (before.format, before.stored, before.files)
    assert TrustedKeys(keys / "me.pub").check(signed) == SigningKey(keys / "me.key").id
    with pytest.raises(ArchiveError, match="not signed with a trusted key"):
        TrustedKeys(keys / "other.pub").check(signed)
    assert sorted(path.name for path in keys.iterdir()) == sorted(
        ["handler.py", "me.key", "me.pub", "other.key", "other.pub", path.name]
    )


def test_s4_signing_gives_an_archive_of_another_maker_its_hashes(keys: Path) -> None:
    path = keys / "cat.mar"
    with zipfile.ZipFile(path, "w") as archive:
        manifest = {"model": {"modelName": "cat", "handler": "handler.py:handle"}, "createdOn": "today"}
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("handler.py", HANDLER)
    assert archiver("sign", path, "--key", keys / "me.key").exit_code == 0
    signed = ModelArchive.open(path)
    assert (list(signed.manifest.files), signed.manifest.raw["createdOn"]) == (["handler.py"], "today")


def test_s4_inspect_and_verify_show_the_signature(keys: Path) -> None:
    path, key_id = pack(keys), SigningKey(keys / "me.key").id
    unsigned = archiver("verify", path, "--trusted-keys", keys / "me.pub")
    assert (unsigned.exit_code, "cat.mar: not signed" in unsigned.output) == (1, True)
    archiver("sign", path, "--key", keys / "me.key")
    assert f"{key_id[:16]} (not checked)" in archiver("inspect", path).output
    assert json.loads(archiver("inspect", "--json", path).output)["signedBy"] == [key_id]
    assert f"its signature names {key_id[:16]}, which --trusted-keys would check" in archiver("verify", path).output
    assert f"signed by {key_id[:16]}" in archiver("verify", path, "--trusted-keys", keys / "me.pub").output
    assert archiver("verify", path, "--trusted-keys", keys / "other.pub").exit_code == 1


def test_s4_the_signature_is_dsse_as_openssl_checks_it(keys: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    path = pack(keys)
    archiver("sign", path, "--key", keys / "me.key")
    envelope = json.loads(ModelArchive.open(path).signature)
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    (keys / "message").write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload))
    (keys / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    words = ["pkeyutl", "-verify", "-pubin", "-inkey", "me.pub", "-rawin", "-in", "message", "-sigfile", "sig"]
    subprocess.run([openssl, *words], cwd=keys, check=True, capture_output=True)


def test_s4_a_key_of_openssl_signs(keys: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    subprocess.run([openssl, "genpkey", "-algorithm", "ed25519", "-out", keys / "his.key"], check=True)
    (keys / "his.key").chmod(0o600)
    assert archiver("sign", pack(keys), "--key", keys / "his.key").exit_code == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda e: e.update(payload=base64.b64encode(b"{}").decode()), "another manifest", id="payload"),
        pytest.param(lambda e: e.update(payloadType="text/plain"), "malformed", id="type"),
        pytest.param(lambda e: e["signatures"][0].update(sig="AAAA"), "not signed with a trusted key", id="bytes"),
        pytest.param(lambda e: e.update(signatures=[]), "names no key", id="none"),
        pytest.param(lambda e: e.update(signatures=e["signatures"] * 17), "malformed", id="many"),
        pytest.param(lambda e: e.update(payload="*"), "malformed", id="base64"),
        pytest.param(lambda e: e.update(signatures=[1]), "malformed", id="entry"),
        pytest.param(lambda e: [], "malformed", id="list"),
    ],
)
def test_s4_a_changed_envelope_is_refused(keys: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    path = pack(keys)
    archiver("sign", path, "--key", keys / "me.key")
    resign(path, change)
    with pytest.raises(ArchiveError, match=words):
        TrustedKeys(keys / "me.pub").check(ModelArchive.open(path))


def test_s4_a_wrong_key_id_does_not_matter(keys: Path) -> None:
    path = pack(keys)
    archiver("sign", path, "--key", keys / "me.key")
    resign(path, lambda envelope: envelope["signatures"][0].update(keyid="<script>"))
    assert TrustedKeys(keys / "me.pub").check(ModelArchive.open(path)) == SigningKey(keys / "me.key").id


def test_s4_a_changed_file_of_a_signed_archive_is_refused_even_without_verify_archives(keys: Path) -> None:
    path = pack(keys)
    archiver("sign", path, "--key", keys / "me.key")
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, b"evil = 1" if name == "handler.py" else data)
    opened = ModelStore(keys, TrustedKeys(keys / "me.pub")).open("cat.mar")
    with pytest.raises(ArchiveError, match=r"handler\.py"):
        opened.extract(keys / "extracted", verify=False)
    assert not (keys / "extracted").exists()


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("", 0o644, "must hold public keys"),
        ("ssh-ed25519 AAAA", 0o644, "must hold public keys"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", 0o644, "cannot be used"),
        ("", 0o666, "others may change them"),
    ],
)
def test_s4_bad_trusted_keys_are_refused(tmp_path: Path, text: str, mode: int, words: str) -> None:
    (tmp_path / "keys").write_text(text)
    (tmp_path / "keys").chmod(mode)
    with pytest.raises(ConfigError, match=words):
        TrustedKeys(tmp_path / "keys")


def test_s4_a_readable_private_key_does_not_sign(keys: Path) -> None:
    (keys / "me.key").chmod(0o644)
    done = archiver("sign", pack(keys), "--key", keys / "me.key")
    assert (done.exit_code, "chmod 600 it" in done.output) == (1, True)


def test_s4_several_keys_may_be_trusted(keys: Path) -> None:
    (keys / "both").write_text((keys / "other.pub").read_text() + (keys / "me.pub").read_text())
    path = pack(keys)
    archiver("sign", path, "--key", keys / "me.key")
    assert TrustedKeys(keys / "both").check(ModelArchive.open(path)) == SigningKey(keys / "me.key").id


def test_s4_without_cryptography_one_line_says_what_is_missing(tmp_path: Path) -> None:
    code = "import sys; sys.modules['cryptography'] = None; from mms_archiver.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "keygen", str(tmp_path / "me")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (
        1,
        "model-archiver: error: signatures need the cryptography package: pip install 'mms-server[sign]'\n",
    )


def test_s4_a_server_with_trusted_keys_serves_only_what_they_signed(keys: Path, make_archive: MakeArchive) -> None:
    path = pack(keys)
    archiver("sign", path, "--key", keys / "me.key")
    with scratch() as folder:
        shutil.copy(keys / "me.pub", folder)
        with server(path, spare=(make_archive("echo"),), folder=folder, trusted_keys=folder / "me.pub") as running:
            assert running.predict("cat", b"x").body == b"signed"
            assert running.describe("cat")["signedBy"] == SigningKey(keys / "me.key").id
            refused = fetch(running.management, "POST", "/models?url=echo-1.0.mar")
            assert (refused.status, "echo-1.0.mar: not signed" in refused.message) == (400, True)
            chosen = fetch(running.management, "POST", "/models?url=cat.mar&model_name=b&handler=os:system")
            assert (chosen.status, "with trusted_keys" in chosen.message) == (400, True)


def test_s4_start_refuses_an_unsigned_archive(keys: Path, make_archive: MakeArchive) -> None:
    with scratch() as folder:
        text = refusal(folder, make_archive("echo"), models=("echo-1.0.mar",), trusted_keys=keys / "me.pub")
    assert text.startswith("echo-1.0.mar: not signed")
