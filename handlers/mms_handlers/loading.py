"""The network that an archive's manifest names, loaded onto the worker's device. Runs in the worker process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from mms.handler import Context

__all__ = ["load_model", "options"]

SAFE_TORCH = "2.10"  # the first in which weights_only holds
_TORCHSCRIPT = (".ts", ".torchscript")
_STATE_DICT = (".safetensors", ".pt", ".pth", ".bin")


def load_model(context: Context) -> torch.nn.Module:
    """The network in the archive's serialized file, ready for inference. Raises ValueError that names what is wrong."""
    name = context.manifest["model"].get("serializedFile", "")
    if not name:
        raise ValueError(
            "the archive has no serialized file; package it with model-archiver --serialized-file model.pt2"
        )
    path = context.path(name)
    model_file = context.manifest["model"].get("modelFile", "")
    if path.suffix == ".pt2":
        return _load_exported(path, context)
    if path.suffix in _TORCHSCRIPT or (path.suffix == ".pt" and not model_file):
        return _load_torchscript(path, context.device)
    if path.suffix not in _STATE_DICT:
        known = ", ".join((".pt2", *_STATE_DICT, *_TORCHSCRIPT))
        raise ValueError(f"{name} cannot be loaded: the file name must end in one of {known}")
    if not model_file:
        raise ValueError(
            f"{name} holds only weights; package it with model-archiver --model-file, or export it to .pt2"
        )
    return _load_weights(path, context.path(model_file), context)


def options(context: Context, section: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """`known` with what model-config.yaml has under `section` on top. Raises ValueError for unknown keys."""
    given = context.config.get(section) or {}
    if not isinstance(given, dict):
        raise ValueError(f"model-config.yaml: {section} must hold 'key: value' lines")
    if unknown := sorted(map(str, given.keys() - known.keys())):
        raise ValueError(f"model-config.yaml: {section} has no {', '.join(unknown)}; it has {', '.join(known)}")
    return {**known, **given}


def _load_exported(path: Path, context: Context) -> torch.nn.Module:
    program = torch.export.load(path)
    _check_batch_dimension(program, path.name, int(context.system_properties.get("batch_size") or 1))
    if not context.weights_are_lent:
        return move_to_device_pass(program, context.device).module()
    for name, weight in program.state_dict.items():
        kept = weight.to("meta")  # not to be moved: it is replaced
        is_parameter = isinstance(weight, torch.nn.Parameter)
        program.state_dict[name] = torch.nn.Parameter(kept, weight.requires_grad) if is_parameter else kept
    return move_to_device_pass(program, dict.fromkeys(("cpu", "cuda", "cuda:0"), context.device)).module()


def _check_batch_dimension(program: torch.export.ExportedProgram, name: str, batch_size: int) -> None:
    first = program.graph_signature.user_inputs[0]
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == first)
    if not len(shape):
        raise ValueError(f"{name} takes a scalar; its input must have a batch dimension first")
    if isinstance(shape[0], int) and not shape[0] == batch_size == 1:
        raise ValueError(
            f"{name} was exported with a static batch dimension of {shape[0]}, which cannot take batches of 1 to "
            f"{batch_size}: export it with dynamic_shapes=({{0: torch.export.Dim('batch')}},)"
        )


def _load_torchscript(path: Path, device: str) -> torch.nn.Module:
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path.name} is not TorchScript ({reason}); weights alone need a --model-file") from None


def _load_weights(path: Path, model_file: Path, context: Context) -> torch.nn.Module:
    model = _model_class(_import_file(model_file), str(context.config.get("model_class", "")))()
    if context.weights_are_lent:
        return model.eval()
    model.load_state_dict(_read_weights(path))
    return model.to(context.device).eval()


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    if torch.__version__ < SAFE_TORCH:
        raise ValueError(
            f"{path.name} is not read by torch {torch.__version__}, in which weights_only can be got round "
            f"(CVE-2026-24747): install torch {SAFE_TORCH} or newer, or save the weights as .safetensors"
        )
    weights = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251  # nothing is tried without it
    if not isinstance(weights, dict):
        raise ValueError(f"{path.name} holds a {type(weights).__name__}, not a state dict; save model.state_dict()")
    return weights


def _import_file(path: Path) -> ModuleType:
    loaded = sys.modules.get(path.stem)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"model file {path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _model_class(module: ModuleType, name: str) -> type[torch.nn.Module]:
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.nn.Module) and value.__module__ == module.__name__
    }
    if name:
        if name not in found:
            raise ValueError(f"{module.__name__}.py has no torch.nn.Module {name}; it has {', '.join(found) or 'none'}")
        return found[name]
    if len(found) != 1:
        raise ValueError(
            f"{module.__name__}.py defines {len(found)} torch.nn.Module classes ({', '.join(found)}); "
            "name the model with model_class in model-config.yaml"
        )
    return next(iter(found.values()))
