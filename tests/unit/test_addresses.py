"""Where the server listens: whose socket files are bound anew."""

from __future__ import annotations

from pathlib import Path

from mms.addresses import Addresses
from mms.config import Config


def unix_sockets(folder: Path) -> Config:
    return Config(
        inference_address=f"unix:{folder}/inference",
        management_address=f"unix:{folder}/management",
        metrics_address=f"unix:{folder}/metrics",
    )


def test_f61_a_file_that_was_bound_anew_during_an_upgrade_is_bound_by_the_successor_when_its_predecessor_has_ended(
    tmp_path: Path,
) -> None:
    config = unix_sockets(tmp_path)
    old = Addresses(config, {})
    inherited = old.listen(None, None)
    new = Addresses.inherited(config, old.of, (), dict(old.sockets))
    new.listen(None, None)
    (tmp_path / "inference").unlink()
    (again,) = old.bind_anew().values()
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
