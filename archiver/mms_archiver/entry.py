"""Finds the handler that an archive names, by reading source and never importing it: a class or a function."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
import symtable
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mms.errors import ArchiveError

PRELOADABLE = ("torch", "torchvision", "numpy", "PIL", "sklearn", "scipy", "onnxruntime", "transformers")

_BUILT_IN = "mms_handlers"
_LOADS_WEIGHTS = f"{_BUILT_IN}.loading.load_model"  # a handler that imports this reads the serialized file


@dataclass(frozen=True, slots=True)
class Entry:
    """A handler as the manifest names it (`module:Name`), what is worth importing before it, and what it needs."""

    handler: str
    preload: tuple[str, ...]
    needs_serialized_file: bool = False


def handler_file(handler: str) -> Path | None:
    """The file in `path/handler.py[:Name]`; None where the handler is named as a module or is a built-in one."""
    location = handler.partition(":")[0]
    return Path(location) if location.endswith(".py") else None


def find_entry(handler: str, files: Mapping[str, Path]) -> Entry:
    """The entry for `--handler`, in the files of the archive or among the built-in handlers. Raises ArchiveError."""
    location, colon, name = handler.partition(":")
    module = location.removesuffix(".py").replace("/", ".")
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", module) or (colon and not name):
        raise ArchiveError(f"{handler!r} names no handler; give handler.py:Name, module:name or a built-in handler")
    source = _archived_source(module, files)
    if source is None:
        return _built_in_entry(module, name, files)
    if module in sys.stdlib_module_names or module in PRELOADABLE:
        raise ArchiveError(f"{source}: would hide the Python module {module}; rename it")
    return Entry(f"{module}:{_choose(source, name)}", _preload(module, files))


def _built_in_entry(module: str, name: str, files: Mapping[str, Path]) -> Entry:
    if module not in built_in_handlers():
        raise ArchiveError(_not_found(module, files))
    full_name = f"{_BUILT_IN}.{module}"
    source = _built_in_source(full_name)
    assert source is not None
    tree = _parse(source)
    its_class = _built_in_class(tree)
    if name not in ("", its_class):
        raise ArchiveError(
            f"the built-in handler {module} has no {name}; it is {module} alone, or {module}:{its_class}"
        )
    loads_weights = _LOADS_WEIGHTS in _imports(tree, _BUILT_IN)
    return Entry(f"{full_name}:{its_class}", _preload(full_name, files), needs_serialized_file=loads_weights)


def built_in_handlers() -> list[str]:
    """The modules of mms_handlers that hold a handler; nothing of them is imported."""
    names = [module.name for module in pkgutil.iter_modules(_built_in_folders())]
    sources = {name: _built_in_source(f"{_BUILT_IN}.{name}") for name in names if not name.startswith("_")}
    return [name for name, source in sources.items() if source and _built_in_class(_parse(source))]


def _not_found(module: str, files: Mapping[str, Path]) -> str:
    there = ", ".join(sorted(name for name in files if name.endswith(".py"))) or "no Python file"
    known = ", ".join(built_in_handlers()) or "none"
    return f"no handler {module}: the archive holds {there}; built-in handlers: {known}"


def _archived_source(module: str, files: Mapping[str, Path]) -> Path | None:
    path = module.replace(".", "/")
    return files.get(f"{path}.py") or files.get(f"{path}/__init__.py")


def _built_in_folders() -> list[str]:
    package = importlib.util.find_spec(_BUILT_IN)
    return list(package.submodule_search_locations or ()) if package else []


def _built_in_source(module: str) -> Path | None:
    path = module.removeprefix(f"{_BUILT_IN}.").replace(".", "/") + ".py"
    found = [Path(folder, path) for folder in _built_in_folders()]
    return next((source for source in found if source.is_file()), None)


def _parse(source: Path) -> ast.Module:
    try:
        return ast.parse(source.read_bytes(), str(source))
    except SyntaxError as error:
        raise ArchiveError(f"{source}: line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{source}: not Python: {error}") from None
    except OSError as error:
        raise ArchiveError(f"{source}: {error.strerror}") from None


def _top_level(statements: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for statement in statements:
        match statement:
            case ast.ClassDef() | ast.FunctionDef():
                yield statement
            case ast.If(body=body, orelse=orelse):
                yield from _top_level(body + orelse)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=finalbody):
                yield from _top_level(body + [s for handler in handlers for s in handler.body] + orelse + finalbody)


def _choose(source: Path, name: str) -> str:
    """`name`, if the file has it; without one, as the server understands a module alone (mms.backend.loader)."""
    tree, file = _parse(source), source.name
    defined = {node.name: isinstance(node, ast.ClassDef) for node in _top_level(tree.body)}
    bound, all_known = _bound(source, tree)
    public = [found for found in defined if not found.startswith("_")]
    there = ", ".join(public) or "no class and no function"
    if name:
        if all_known and name not in bound:
            raise ArchiveError(f"{file} has no {name}; it holds: {there}")
        return name
    if "handle" in bound:
        return "handle"
    classes = [found for found in public if defined[found]]
    if len(classes) != 1:
        raise ArchiveError(f"which handler of {file}? Give --handler {file}:Name; it holds: {there}")
    return classes[0]


def _bound(source: Path, tree: ast.Module) -> tuple[set[str], bool]:
    """The names that the file's top level assigns, imports or defines, and whether these are all (no `import *`)."""
    try:
        # bytes, so that a coding line counts; the stubs know str only
        symbols = symtable.symtable(source.read_bytes(), str(source), "exec").get_symbols()  # type: ignore[arg-type]
    except SyntaxError as error:
        raise ArchiveError(f"{source}: line {error.lineno}: {error.msg}") from None
    starred = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree))
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}, not starred


def _built_in_class(tree: ast.Module) -> str | None:
    bases = {"Handler"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_BUILT_IN):
            bases |= {alias.asname or alias.name for alias in node.names}
    found = [
        node.name
        for node in _top_level(tree.body)
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(ast.unparse(base).rpartition(".")[2] in bases for base in node.bases)
    ]
    return found[0] if len(found) == 1 else None


def _preload(module: str, files: Mapping[str, Path]) -> tuple[str, ...]:
    """The frameworks that the handler imports, itself or through other modules of its archive or of mms_handlers."""
    waiting, seen, found = [module], set[str](), set[str]()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        found.add(module.partition(".")[0])
        source = _archived_source(module, files)
        if source is None and module.startswith(_BUILT_IN + "."):
            source = _built_in_source(module)
        if source is not None:
            waiting += _imports(_parse(source), module.rpartition(".")[0])
    return tuple(name for name in PRELOADABLE if name in found)


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Modules imported anywhere in the file, except for type checking only."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                continue
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = ".".join(part for part in (package if level else "", module or "") if part)
                yield from (f"{base}.{alias.name}" if base else alias.name for alias in names)
                yield base
            case _:
                yield from _imports(node, package)
