"""`python -m tests.faults.catalogue`: writes into docs/reliability.md which tests prove each row of the fault table."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
ROWS = range(1, 115)
_TEST = re.compile(r"^(?:async )?def test_((?:f\d+_)+)", re.MULTILINE | re.IGNORECASE)
_ROW = re.compile(r"^\| F(\d+) \|(.*)\|([^|]*)\|$")


def proofs() -> dict[int, list[str]]:
    """The files with tests of each row, below tests/."""
    found: dict[int, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for numbers in _TEST.findall(path.read_text()):
            for number in re.findall(r"\d+", numbers):
                found.setdefault(int(number), set()).add(str(path.relative_to(ROOT / "tests")))
    return {number: sorted(files) for number, files in found.items()}


def complete(page: str) -> str:
    """The page with the files in the last column; a row without a test keeps its reason."""
    known = proofs()

    def row(line: str) -> str:
        match = _ROW.match(line)
        if match is None or int(match[1]) not in known:
            return line
        files = ", ".join(f"[{name}](../tests/{name})" for name in known[int(match[1])])
        return f"| F{match[1]} |{match[2]}| {files} |"

    return "\n".join(map(row, page.split("\n")))


def reasons(page: str) -> dict[int, str]:
    """The last column of each row of the page."""
    return {int(match[1]): match[3].strip() for line in page.splitlines() if (match := _ROW.match(line))}


if __name__ == "__main__":
    PAGE.write_text(complete(PAGE.read_text()))
