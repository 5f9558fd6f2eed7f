"""`python -m tests.faults.catalogue`: writes into the docs which tests prove each row of their two tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
_TEST = re.compile(r"^(?:async )?def test_((?:[fs]\d+_)+)", re.MULTILINE | re.IGNORECASE)


class Table(NamedTuple):
    """A table whose rows are numbered and end with a column of the files that prove them."""

    page: Path
    letter: str
    rows: int

    def complete(self, text: str) -> str:
        """The page with the files in the last column; a row without a test keeps its reason."""
        known = self.proofs()

        def row(line: str) -> str:
            match = self._row(line)
            if match is None or int(match[1]) not in known:
                return line
            files = ", ".join(f"[{name}](../tests/{name})" for name in known[int(match[1])])
            return f"| {self.letter}{match[1]} |{match[2]}| {files} |"

        return "\n".join(map(row, text.split("\n")))

    def reasons(self, text: str) -> dict[int, str]:
        """The last column of each row of the page."""
        return {int(match[1]): match[3].strip() for line in text.splitlines() if (match := self._row(line))}

    def proofs(self) -> dict[int, list[str]]:
        """The files with tests of each row, below tests/."""
        found: dict[int, set[str]] = {}
        for path in sorted(TESTS.rglob("test_*.py")):
            for numbers in _TEST.findall(path.read_text()):
                for number in re.findall(rf"{self.letter}(\d+)", numbers, re.IGNORECASE):
                    found.setdefault(int(number), set()).add(str(path.relative_to(TESTS)))
        return {number: sorted(files) for number, files in found.items()}

    def _row(self, line: str) -> re.Match[str] | None:
        return re.match(rf"^\| {self.letter}(\d+) \|(.*)\|([^|]*)\|$", line)


FAULTS = Table(TESTS.parent / "docs" / "reliability.md", "F", 114)
CHECKLIST = Table(TESTS.parent / "docs" / "security.md", "S", 25)

if __name__ == "__main__":
    for table in (FAULTS, CHECKLIST):
        table.page.write_text(table.complete(table.page.read_text()))
