"""Does to its process what the body says (`what` or `what argument`); answers with what came of it."""

import asyncio
import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types

from mms.handler import Handler

LEAKED = []


def env(_):
    with open("/proc/self/environ") as file:
        return {"own": dict(os.environ), "started_with": file.read()}


def facts(_):
    import resource

    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    with open("/proc/self/oom_score_adj") as file:
        oom_score = int(file.read())
    return {
        "pid": os.getpid(),
        "session": os.getsid(0),
        "uids": os.getresuid(),
        "groups": os.getgroups(),
        "no_new_privs": status["NoNewPrivs"],
        "capabilities": status["CapEff"],
        "umask": status["Umask"],
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
        "memory": resource.getrlimit(resource.RLIMIT_AS),
        "oom_score": oom_score,
        "nice": os.nice(0),
        "scratch": tempfile.gettempdir(),
        "home": os.path.expanduser("~"),
        "cwd": os.getcwd(),
    }


def parent_death_signal(_):
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))
    return number.value


def read(path):
    with open(path, "rb") as file:
        return len(file.read(64))


def write(path):
    with open(path, "a") as file:
        file.write("x")


def scratch(_):
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(b"x")
    return file.name


def truncate(path):
    os.truncate(path, 0)


def connect(family):
    socket.socket(getattr(socket, family)).close()


def pair(_):
    for end in socket.socketpair():
        end.close()


def run(command):
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True).stdout


def allocate(size):
    return len(bytearray(int(size)))


def leak_memory(size):
    LEAKED.append(b"x" * int(size))


def leak_files(count):
    LEAKED.extend(os.open("/dev/null", os.O_RDONLY) for _ in range(int(count)))


def leak_thread(_):
    threading.Thread(target=threading.Event().wait).start()


def hold_gil(_):
    ctypes.PyDLL(None).pause()


def daemonise(path):
    """The original ends; what goes on is in a session of its own and holds the channel."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(f"{path}.new", "w") as file:
                file.write(str(os.getpid()))
            os.rename(f"{path}.new", path)
            time.sleep(60)
        os._exit(0)
    while not os.path.exists(path):
        time.sleep(0.001)
    os._exit(0)


def replace_descriptors(_):
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3, 21):
        os.dup2(null, fd)


def exit_in_thread(_):
    thread = threading.Thread(target=sys.exit, args=(7,))
    thread.start()
    thread.join()


def exit(code):
    os._exit(int(code))


def say_and_die(text):
    print(text, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def block_signals(_):
    signal.pthread_sigmask(signal.SIG_SETMASK, range(1, 65))


def alarm(_):
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    threading.Event().wait()


def segfault(_):
    """As a recursion without end does where Python's own limit was lifted."""
    sys.setrecursionlimit(10**9)
    gc.disable()
    ctypes.CDLL(None).memset(0, 0, 1)


def break_device(_):
    """As a fault in a kernel does: from then on, every call of CUDA fails."""

    def fail():
        raise RuntimeError("CUDA error: device-side assert triggered")

    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=fail)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    fail()


def event_loop(_):
    async def double():
        await asyncio.sleep(0)
        return 2

    return asyncio.run(double())


def sleep(seconds):
    time.sleep(float(seconds))


def spin(count):
    for _ in range(int(count)):
        if os.fork() == 0:
            while True:
                pass


class Misbehaves(Handler):
    def inference(self, batch):
        return [self.one(item.decode()) for item in batch]

    def one(self, text):
        what, _, argument = text.partition(" ")
        if what == "echo":
            return {"pid": os.getpid(), "result": argument}
        try:
            return {"pid": os.getpid(), "result": globals()[what](argument)}
        except OSError as error:
            return {"pid": os.getpid(), "error": error.strerror}
        except MemoryError:
            return {"pid": os.getpid(), "error": "MemoryError"}
