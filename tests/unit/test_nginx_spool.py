"""What killed workers of nginx have left of the bodies that they spooled."""

from __future__ import annotations

import os
from pathlib import Path

from mms_nginx.spool import remove_leftovers


def test_f57_what_no_worker_has_open_goes_and_what_one_has_open_stays(tmp_path: Path) -> None:
    (tmp_path / "real" / "body").mkdir(parents=True)
    (tmp_path / "spool").symlink_to(tmp_path / "real")
    left, kept = (tmp_path / "spool" / "body" / name for name in ("1", "2"))
    left.write_bytes(b"of a killed worker")
    with kept.open("wb"):
        remove_leftovers(tmp_path / "spool", lambda: {os.getpid(), 1 << 22})  # the other one has just ended
        assert [path.name for path in left.parent.iterdir()] == ["2"]
    remove_leftovers(tmp_path / "spool", set)
    assert not list(left.parent.iterdir())
    remove_leftovers(tmp_path / "none", set)
