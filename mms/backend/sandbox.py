"""What a worker gives up before it loads anything: limits, privileges and, where asked for, user, files and network.

Runs in the worker process while it has one thread, as most of this binds the calling thread and what it starts. As a
program (`python -m mms.backend.sandbox`) it tries a sandbox, or becomes another program in it, and says in one line why
it cannot be had.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from mms import arena, wire

MAX_DESCRIPTORS = 4096
OOM_SCORE = 500  # above the server's: the kernel takes workers first
LANDLOCK_ABI = 3  # Linux 6.2: the first one that forbids to truncate files
FILE_SYSTEM, NETWORK = "worker_fs = restricted", "worker_network = none"

_PR_SET_PDEATHSIG = 1  # prctl(2)
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # landlock(7), on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL = 1, 2, 4, 8, 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_ALL = (1 << 15) - 1
_SCOPES = 3  # abstract Unix sockets and signals stay among the worker's own processes (ABI 6)

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt", "/etc", "/sys",
           "/run/systemd/resolve")  # fmt: skip
_PROC = ("cpuinfo", "devices", "driver", "filesystems", "loadavg", "meminfo", "modules", "stat", "sys", "uptime",
         "version", "vmstat")  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_GPU_DEVICES = ("nvidia*", "nvidia-caps/*", "kfd", "dri/*")

# seccomp(2): audit architecture, and the numbers of socket and of what could get round its refusal
_CALLS = {
    "x86_64": (0xC000003E, 41, {"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311}),
    "aarch64": (0xC00000B7, 198, {"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271}),
}
_COMMON_CALLS = {"io_uring_setup": 425, "pidfd_getfd": 438}
_X32 = 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # bpf(4)
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel, or a missing permission, does not allow what was asked for; the text names the setting."""


def limit() -> None:
    """What every worker does: bounded descriptors, no core files, no new privileges, first in line when memory ends."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MAX_DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # no /proc: the limit is a courtesy to the server
        score = int(Path("/proc/self/oom_score_adj").read_text())
        Path("/proc/self/oom_score_adj").write_text(str(min(1000, score + OOM_SCORE)))
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def apply(sandbox: wire.Sandbox, directory: str, scratch: str) -> None:
    """Put `sandbox` on this process; it may read `directory` and write in `scratch`. Raises Refused."""
    if sandbox.nice:
        os.nice(sandbox.nice)
    if sandbox.uid != -1:
        _become(sandbox)
    if sandbox.memory:
        most = sandbox.memory + arena.SIZE  # the memory for large bodies is the server's matter
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    take_home(sandbox, scratch)
    if sandbox.files:
        _restrict_files([directory, *sandbox.read, *_python()], scratch, gpu=sandbox.gpu)
    if not sandbox.network:
        _restrict_network()


def take_home(sandbox: wire.Sandbox, scratch: str) -> None:
    """The server's home is not for those to read who are another user, or restricted."""
    if scratch and (sandbox.uid != -1 or sandbox.files):
        os.environ["HOME"] = scratch
        os.environ.pop("XDG_CACHE_HOME", None)


def _become(sandbox: wire.Sandbox) -> None:
    try:
        os.setgroups(sandbox.groups)
        os.setresgid(sandbox.gid, sandbox.gid, sandbox.gid)
        os.setresuid(sandbox.uid, sandbox.uid, sandbox.uid)
    except OSError as error:
        raise Refused(f"worker_user: cannot become user {sandbox.uid}: {error.strerror}") from None
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user has cleared it


# files


def _restrict_files(readable: Iterable[str], scratch: str, *, gpu: bool) -> None:
    """Read the system, Python and `readable`; write `scratch` and the usual devices; nothing else."""
    abi = landlock_abi()
    if abi < LANDLOCK_ABI:
        found = f"this kernel has Landlock {abi}" if abi > 0 else "this kernel has none, or it is switched off"
        raise Refused(f"{FILE_SYSTEM} needs Landlock {LANDLOCK_ABI} (Linux 6.2); {found}")
    handled = _ALL | (_IOCTL if abi >= 5 else 0)
    attributes = struct.pack("<QQQ", handled, 0, _SCOPES)[: 24 if abi >= 6 else 8]
    ruleset = _landlock(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    try:
        # of /proc, other processes are left out: their environment is as readable as a file. The rules for this one
        # last as long as something holds its folders, so the descriptors stay open.
        own, threads = f"/proc/{os.getpid()}", f"/proc/{os.getpid()}/task"
        for path in own, threads:
            os.set_inheritable(os.open(path, os.O_PATH), True)  # it may yet become another program
        for path in {*_SYSTEM, own, *(f"/proc/{name}" for name in _PROC), *readable}:
            _allow(ruleset, path, _READ)
        if gpu:
            _allow(ruleset, threads, _READ | _WRITE_FILE | _TRUNCATE)  # CUDA names its threads, or does not start
        gpus = [str(path) for pattern in _GPU_DEVICES for path in Path("/dev").glob(pattern)] if gpu else []
        for device in (*_DEVICES, *gpus):
            _allow(ruleset, device, handled & (_READ_FILE | _WRITE_FILE | _IOCTL))
        if scratch:
            _allow(ruleset, scratch, handled)
        _landlock(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 without."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def _allow(ruleset: int, path: str, rights: int) -> None:
    """What is not there needs no rule."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(f"/proc/self/fd/{fd}"):
            rights &= _OF_FILES
        _landlock(_ADD_RULE, ruleset, 1, struct.pack("<Qi", rights, fd), 0)
    finally:
        os.close(fd)


def _landlock(call: int, *arguments: object) -> int:
    result: int = _libc.syscall(call, *arguments)
    if result < 0:
        raise Refused(f"{FILE_SYSTEM}: Landlock refuses: {os.strerror(ctypes.get_errno())}")
    return result


def _python() -> list[str]:
    """Where modules are imported from, and the libraries that come with them."""
    ours = str(Path(__file__).parents[2])
    return [ours, sys.prefix, sys.base_prefix, *(path for path in sys.path if path)]


# network


def _restrict_network() -> None:
    """Sockets of no other family than Unix, and none taken from another process."""
    machine = platform.machine()
    if machine not in _CALLS:
        raise Refused(f"{NETWORK} is not known on {machine}, only on {' and '.join(_CALLS)}")
    architecture, socket_call, calls = _CALLS[machine]
    program = filter_program(architecture, socket_call, [*calls.values(), *_COMMON_CALLS.values()])
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0):
        raise Refused(f"{NETWORK}: the kernel takes no seccomp filter: {os.strerror(ctypes.get_errno())}")


def filter_program(architecture: int, socket_call: int, forbidden: list[int]) -> bytes:
    """The BPF program: foreign architectures and `forbidden` calls are refused, `socket` for all but AF_UNIX."""
    refuse = 5 + len(forbidden) + 3  # the index of the last instruction
    steps = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_EQUAL, 0, refuse - 2, architecture),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_AT_LEAST, refuse - 4, 0, _X32),
        *((_EQUAL, refuse - 5 - index, 0, call) for index, call in enumerate(forbidden)),
        (_EQUAL, 0, 2, socket_call),
        (_LOAD, 0, 0, 16),  # the low half of its first argument
        (_EQUAL, 0, 1, socket.AF_UNIX),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


# trial


def main() -> None:
    """Runs in a process of its own: exit code 0 if a worker could work like this, else one line on standard error.

    With a folder and a command, it becomes that command, which may read the folder and works there.
    """
    sandbox = msgspec.json.decode(sys.argv[1], type=wire.Sandbox)
    scratch, *then = sys.argv[2:]
    try:
        limit()
        apply(sandbox, then[0] if then else scratch, scratch)
        if then:
            os.environ["TMPDIR"] = scratch
            os.chdir(then[0])
            os.execv(then[1], then[1:])
        _try_out(sandbox, scratch)
    except Refused as error:
        sys.exit(str(error))
    except OSError as error:
        who = f"worker_user {sandbox.uid}" if sandbox.uid != -1 else "a restricted worker"
        sys.exit(f"{who} cannot use {error.filename or scratch}: {error.strerror}")


def _try_out(sandbox: wire.Sandbox, scratch: str) -> None:
    """Raises Refused or OSError."""
    for folder in (Path(__file__).parent, Path(os.__file__).parent):
        os.listdir(folder)
    (Path(scratch) / "trial").write_bytes(b"")
    (Path(scratch) / "trial").unlink()
    if not sandbox.network:
        with contextlib.suppress(PermissionError):
            socket.socket(socket.AF_INET).close()
            raise Refused(f"{NETWORK}: the kernel takes the filter but does not apply it")


if __name__ == "__main__":
    main()
