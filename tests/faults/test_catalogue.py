"""The fault table in docs/reliability.md and the checklist in docs/security.md say what is true."""

from __future__ import annotations

import pytest

from tests.faults.catalogue import CHECKLIST, FAULTS, Table

tables = pytest.mark.parametrize("table", [FAULTS, CHECKLIST], ids=["faults", "checklist"])


@tables
def test_every_row_is_in_the_table(table: Table) -> None:
    assert list(table.reasons(table.page.read_text())) == list(range(1, table.rows + 1))


@tables
def test_the_table_names_the_tests_there_are(table: Table) -> None:
    page = table.page.read_text()
    assert table.complete(page) == page, "python -m tests.faults.catalogue brings it up to date"


@tables
def test_a_row_without_a_test_has_a_reason(table: Table) -> None:
    proved = table.proofs()
    unproved = {number: text for number, text in table.reasons(table.page.read_text()).items() if number not in proved}
    assert [number for number, text in unproved.items() if not text.startswith(("not done: ", "see "))] == []
