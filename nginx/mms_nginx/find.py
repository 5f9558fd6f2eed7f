"""What this machine has: the nginx program, and the user that its workers should run as."""

from __future__ import annotations

import os
import pwd
import shutil

_USERS = ("www-data", "nginx", "nobody")
_EXTRA_PATH = ("/usr/sbin", "/usr/local/sbin")


def find_nginx(program: str) -> str | None:
    """The absolute path of the nginx program, or None; the sbin folders are often missing from a user's PATH."""
    found = shutil.which(program) or shutil.which(program, path=os.pathsep.join(_EXTRA_PATH))
    return os.path.abspath(found) if found else None


def edge_user() -> tuple[str, int] | None:
    """As root: the unprivileged user that nginx's workers run as, and its group; otherwise None (they run as we do)."""
    if os.geteuid() != 0:
        return None
    for name in _USERS:
        try:
            return name, pwd.getpwnam(name).pw_gid
        except KeyError:
            continue
    return None
