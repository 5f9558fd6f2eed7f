"""Hostile bytes for everything that reads bytes: short in `make test`, long by `make fuzz`."""
