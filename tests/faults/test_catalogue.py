"""The fault table in docs/reliability.md says what is true."""

from __future__ import annotations

from tests.faults.catalogue import PAGE, ROWS, complete, proofs, reasons


def test_every_row_of_the_catalogue_is_in_the_table() -> None:
    assert list(reasons(PAGE.read_text())) == list(ROWS)


def test_the_table_names_the_tests_there_are() -> None:
    page = PAGE.read_text()
    assert complete(page) == page, "python -m tests.faults.catalogue brings it up to date"


def test_a_row_without_a_test_has_a_reason() -> None:
    proved = proofs()
    unproved = {number: text for number, text in reasons(PAGE.read_text()).items() if number not in proved}
    assert [number for number, text in unproved.items() if not text.startswith(("not done: ", "see "))] == []
