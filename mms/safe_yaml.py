"""YAML from people we need not trust: settings files and the model-config.yaml of archives, read with limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mms.errors import ConfigError

MAX_FILE = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 100  # of a whole number
MAX_KEY_DIGITS = 18  # of one that is a key

_WHOLE = "tag:yaml.org,2002:int"


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that stands twice is an error, and so are depth and aliases (bombs need them)."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML leaves its parser untyped
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= MAX_DEPTH:  # the scanner runs far ahead, at a cost that grows with the depth
            mark: Any = self.get_mark()
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels deep", problem_mark=mark)
        super().fetch_flow_collection_start(token)

    def construct_whole(self, node: Any) -> int:
        """Of many digits a number takes time that grows with their square: `1:59:59...` is one to the base of 60."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(
                problem=f"a number has more than {MAX_DIGITS} digits", problem_mark=node.start_mark
            )
        return int(self.construct_yaml_int(node))

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key.start_mark)
            if key.tag == _WHOLE and len(key.value) > MAX_KEY_DIGITS:  # multiples of 2**61 - 1 share one hash
                raise yaml.MarkedYAMLError(
                    problem=f"a key is a number of more than {MAX_KEY_DIGITS} digits", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_UniqueKeys.add_constructor(_WHOLE, _UniqueKeys.construct_whole)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with one mapping: at most 1 MiB, 32 levels, no aliases, no repeated keys. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return parse_yaml(data, str(path))


def parse_yaml(data: bytes, origin: str) -> dict[str, Any]:
    """As read_yaml, from memory; `origin` is named in errors."""
    if len(data) > MAX_FILE:
        raise ConfigError(f"{origin}: larger than {MAX_FILE} bytes")
    try:
        content = yaml.load(data, _UniqueKeys)  # noqa: TID251  # the one place
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ConfigError(f"{origin}:{line} {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        first = str(error).partition("\n")[0]  # PyYAML's constructors raise any of these on values that do not fit
        raise ConfigError(f"{origin}: not YAML: {first}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{origin}: must hold 'key: value' lines")
    return content
