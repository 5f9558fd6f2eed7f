"""From a LOAD frame to a handler that is ready to take batches. Runs in the worker process."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mms.backend import oldnames
from mms.backend.stages import BatchStages, RequestStages, Stages
from mms.errors import ModelLoadError
from mms.handler import Context, Handler
from mms.wire import Load

_HINT = "a function handler is called once at load with data=None, as in MMS: return at once when data is None"


def load_handler(load: Load, are_lent: Callable[[], bool] = lambda: False) -> Stages:
    """Import the archive's handler and initialize it. Whatever the handler raises passes through.

    `are_lent` tells it whether its weights are replaced afterwards.
    """
    sys.path.insert(0, load.directory)
    limit_threads(load.cpu_threads)
    oldnames.provide()
    context = Context(load, device_of(load), are_lent)
    entry = find_entry(load.handler, Path(load.directory))
    isolate = load.isolate_errors
    if inspect.isclass(entry):
        handler: Any = entry()
        if isinstance(handler, Handler):
            handler.initialize(context)
            return RequestStages(handler, context, isolate=isolate != "false", limit=load.max_response_size)
        if callable(getattr(handler, "initialize", None)):
            handler.initialize(context)
        handle = handler.handle
    else:
        handle = entry
        try:
            handle(None, context)
        except Exception as error:
            error.add_note(_HINT)
            raise
    return BatchStages(handle, context, isolate=isolate == "true", limit=load.max_response_size)


def device_of(load: Load) -> str:
    """The worker's device, as torch names it."""
    return f"cuda:{load.gpu}" if load.gpu is not None else "cpu"


def find_entry(handler: str, directory: Path) -> Any:
    """The class or function that `module:Name`, `module.py:name` or (as MMS has it) `module` names.

    A module alone means its `handle`, else its only public class; the archiver goes by the same rule when it chooses
    from source that it does not import. Raises ModelLoadError, also for a class that cannot serve; what the module
    raises passes through.
    """
    entry = _named(handler, directory)
    if inspect.isclass(entry) and not (issubclass(entry, Handler) or callable(getattr(entry, "handle", None))):
        raise ModelLoadError(
            f"{handler}: the class {entry.__name__} has neither handle(data, context) nor mms.handler.Handler as base"
        )
    return entry


def _named(handler: str, directory: Path) -> Any:
    module_name, _, name = handler.partition(":")
    module = _import(module_name.removesuffix(".py"), directory)
    if name:
        if not callable(getattr(module, name, None)):
            raise ModelLoadError(
                f"{module_name} defines no class or function {name}; it defines: {', '.join(_defined(module))}"
            )
        return getattr(module, name)
    if callable(getattr(module, "handle", None)):
        return module.handle
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not value.__name__.startswith("_")
    ]
    if len(classes) != 1:
        raise ModelLoadError(
            f"{module_name} has no function handle and {len(classes)} public classes; "
            "name the entry in the manifest as module:Name"
        )
    return classes[0]


def limit_threads(threads: int) -> None:
    """Let the libraries that are already imported use `threads` CPU threads; others read the environment.

    Beside torch, numpy and scipy keep one: OpenBLAS's helpers spin for 0.1 s when they start and after each product.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
        if "sklearn" in sys.modules:  # looking for its libraries takes milliseconds
            _limit_pools(threads, "openmp")
    elif "numpy" in sys.modules:
        _limit_pools(threads)


def _limit_pools(threads: int, kind: str | None = None) -> None:
    if importlib.util.find_spec("threadpoolctl"):
        importlib.import_module("threadpoolctl").threadpool_limits(threads, user_api=kind)


def _import(name: str, directory: Path) -> ModuleType:
    """The archive's own file comes before anything of that name that is installed or imported already."""
    path = directory / f"{name.replace('.', '/')}.py"
    if not path.is_file():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _defined(module: ModuleType) -> list[str]:
    return sorted(
        name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
    ) or ["nothing"]
