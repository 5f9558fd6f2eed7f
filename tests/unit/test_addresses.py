"""Where the server listens: whose socket files are bound anew."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mms_nginx.check import listen

from mms.addresses import Addresses
from mms.config import Config
from mms.errors import StartError
from mms.http.listener import bind

Listen = Callable[[str], socket.socket]


def unix_sockets(folder: Path) -> Config:
    return Config(
        inference_address=f"unix:{folder}/inference",
        management_address=f"unix:{folder}/management",
        metrics_address=f"unix:{folder}/metrics",
    )


@pytest.mark.parametrize("looks", ["early", "late"])
def test_f61_a_file_that_was_bound_anew_during_an_upgrade_is_bound_by_the_successor_when_its_predecessor_has_ended(
    tmp_path: Path, looks: str
) -> None:
    config = unix_sockets(tmp_path)
    old = Addresses(config, {})
    inherited = old.listen(None, None)
    told = old.of, (), dict(old.sockets), dict(old.files)
    early = Addresses.inherited(config, *told)
    early.listen(None, None)
    (tmp_path / "inference").unlink()
    (again,) = old.bind_anew().values()
    late = Addresses.inherited(config, *told)
    late.listen(None, None)
    new = {"early": early, "late": late}[looks]
    assert (old.bind_anew(), new.bind_anew()) == ({}, {}), "somebody listens there"
    again.close()
    bound = new.bind_anew()
    assert list(bound) == ["inference"]
    assert new.bind_anew() == {}
    for sock in (*inherited, *bound.values()):
        sock.close()


def test_what_has_taken_the_place_of_a_socket_file_stays(tmp_path: Path) -> None:
    config = unix_sockets(tmp_path)
    addresses = Addresses(config, {})
    bound = addresses.listen(None, None)
    (tmp_path / "metrics").unlink()
    (tmp_path / "metrics").write_text("a file")
    assert addresses.bind_anew() == {}
    for sock in bound:
        sock.close()


both = pytest.mark.parametrize("by", [bind, listen], ids=["front end", "nginx"])


@both
def test_f70_a_socket_file_at_which_somebody_listens_is_not_taken_over(tmp_path: Path, by: Listen) -> None:
    path = tmp_path / "public"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen(0)
        before = path.stat().st_ino
        for who in (f"{psutil.Process().name()} (pid {os.getpid()})", "another process"):  # then, its backlog is full
            with pytest.raises(StartError) as caught:
                by(f"unix:{path}")
            text = f"cannot listen on unix:{path}: {who} listens there; stop it, or choose another address"
            assert str(caught.value) == text
        assert path.stat().st_ino == before


@both
def test_f70_a_file_that_is_no_socket_stays(tmp_path: Path, by: Listen) -> None:
    path = tmp_path / "public"
    path.write_text("somebody's")
    with pytest.raises(StartError, match=r"unix:.*/public: a file that is no socket is there; remove it, or choose an"):
        by(f"unix:{path}")
    assert path.read_text() == "somebody's"


@both
def test_f70_a_socket_file_that_a_dead_server_has_left_is_replaced(tmp_path: Path, by: Listen) -> None:
    path = tmp_path / "public"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen(1)
    with by(f"unix:{path}"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@both
def test_f70_a_socket_path_that_is_too_long_is_one_line(tmp_path: Path, by: Listen) -> None:
    with pytest.raises(StartError, match=r"/x+ is longer than 107 bytes; choose a shorter"):
        by(f"unix:{tmp_path}/{'x' * 108}")
