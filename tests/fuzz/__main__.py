"""`make fuzz`: every target for so many seconds, by atheris (pip install atheris) if installed, else by hypothesis.

What atheris finds is left in fuzz-findings/; hypothesis prints the smallest example. Exit code 1 when there is one.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

FINDINGS = Path("fuzz-findings")
MEMORY = 1024  # MiB
ONE_INPUT = 10  # seconds
ROUND = 500
NAMES = ("http", "codec", "archive", "manifest", "yaml", "multipart", "body")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="per target")
    parser.add_argument("--engine", choices=["atheris", "hypothesis"])
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    engine = words.engine or ("atheris" if importlib.util.find_spec("atheris") else "hypothesis")
    if words.inside:
        atheris_inside(words.targets[0], words.seconds)
    failed = []
    for name in words.targets or NAMES:
        begun = time.monotonic()
        count = atheris(name, words.seconds) if engine == "atheris" else hypothesis(name, words.seconds)
        seconds = time.monotonic() - begun
        print(
            f"{name}: {f'{count:,} inputs, no finding' if count else 'A FINDING'} in {seconds:.0f} s ({engine})",
            flush=True,
        )
        failed += [name] if not count else []
    return 1 if failed else 0


def hypothesis(name: str, seconds: float) -> int:
    """The number of inputs; 0 when one breaks a promise."""
    from tests.fuzz.mutations import mutations
    from tests.fuzz.targets import TARGETS

    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:

        @seed(random.getrandbits(64))
        @settings(
            max_examples=ROUND,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def run(data: st.DataObject) -> None:
            nonlocal count
            TARGETS[name](data.draw(mutations(name)))
            count += 1

        try:
            run()
        except Exception as error:
            print(f"{name}: {error!r}", *getattr(error, "__notes__", ()), sep="\n")
            return 0
    return count


def atheris(name: str, seconds: float) -> int:
    """As hypothesis, in a process of its own: libFuzzer ends the one it runs in."""
    command = [sys.executable, "-m", "tests.fuzz", name, "--inside", "--seconds", str(seconds)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        print(ended.stderr[-4000:])
        return 0
    done = [line for line in ended.stderr.splitlines() if line.startswith("stat::number_of_executed_units:")]
    return int(done[0].split()[-1]) if done else 1


def atheris_inside(name: str, seconds: float) -> None:
    """Runs libFuzzer; does not return."""
    import atheris

    with atheris.instrument_imports(include=["mms"]):
        from tests.fuzz.targets import CORPUS, MAX_SIZE, TARGETS
    FINDINGS.mkdir(exist_ok=True)
    from tests.fuzz.mutations import TOKENS

    with tempfile.TemporaryDirectory(prefix="mms-fuzz-") as folder:
        words = Path(folder) / "tokens"
        words.write_text("".join(f'"{_escaped(token)}"\n' for token in TOKENS[name]))
        found = Path(folder) / "corpus"
        found.mkdir()
        options = (
            f"-max_total_time={max(1, round(seconds))}", f"-max_len={MAX_SIZE}", f"-rss_limit_mb={MEMORY}",
            f"-timeout={ONE_INPUT}", f"-dict={words}", f"-artifact_prefix={FINDINGS}/{name}-", "-print_final_stats=1",
        )  # fmt: skip
        atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / name)], TARGETS[name])
        atheris.Fuzz()


def _escaped(token: bytes) -> str:
    return "".join(chr(byte) if 32 < byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in token)


if __name__ == "__main__":
    raise SystemExit(main())
