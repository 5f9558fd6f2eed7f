"""MMS serves model archives over HTTP, each from its own pool of worker processes."""

__version__ = "0.1.0"
