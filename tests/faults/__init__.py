"""A test per row of the fault catalogue, with the row's number in its name; docs/reliability.md lists them all."""
