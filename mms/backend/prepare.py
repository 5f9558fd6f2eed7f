"""What a worker does between `initialize` and READY: compile, CUDA graphs, the warm-up. Runs in the worker process."""

from __future__ import annotations

import sys
from typing import Any

from mms import wire
from mms.backend.cuda import CudaGraphs, GraphedModule
from mms.backend.stages import RequestStages, Stages
from mms.backend.warmup import warm_up


def prepare(stages: Stages, load: wire.Load) -> None:
    """Compile and warm up as the settings say. Raises ModelLoadError when a sample of the warm-up fails.

    Whatever stands in the way of compiling and of CUDA graphs is one line in the model's log, and is done without.
    """
    wanted = load.preparation
    if load.preprocess_threads and load.gpu is None and not isinstance(stages, RequestStages):  # on GPUs, the default
        warn("preprocess_threads does nothing: it needs a request-style handler")
    networks = _networks(stages) if wanted.compile or wanted.cuda_graphs else {}
    compiled = wanted.compile and _can_compile(networks)
    graphed = bool(wanted.cuda_graphs) and _can_graph(networks, load)
    if compiled or graphed:
        handler = stages.handler
        try:
            graphs = _replace(handler, networks, wanted, compiled=compiled, graphed=graphed)
            warm_up(stages, load)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            warn(f"{'compile' if compiled else 'cuda_graphs'} failed, it is done without: {reason}")
            for name, network in networks.items():
                setattr(handler, name, network)
        else:
            for graph in graphs:
                graph.seal()
            if compiled:  # what is compiled later, for other shapes, may fail as well
                sys.modules["torch"]._dynamo.config.suppress_errors = True
            return
    warm_up(stages, load)


def warn(text: str) -> None:
    """One line in the model's log."""
    sys.stderr.write(f"warning: {text}\n")


def _networks(stages: Stages) -> dict[str, Any]:
    """The nn.Modules that a request-style handler holds, by attribute."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(stages, RequestStages):
        return {}
    return {name: value for name, value in vars(stages.handler).items() if isinstance(value, torch.nn.Module)}


def _can_compile(networks: dict[str, Any]) -> bool:
    if not networks:
        warn("compile does nothing: it needs a request-style handler with a torch.nn.Module as attribute")
    return bool(networks)


def _can_graph(networks: dict[str, Any], load: wire.Load) -> bool:
    if load.gpu is None:
        warn("cuda_graphs does nothing on a CPU")
    elif not networks:
        warn("cuda_graphs does nothing: it needs a request-style handler with a torch.nn.Module as attribute")
    elif not load.preparation.warmup:
        warn("cuda_graphs does nothing without a warmup, in which they are captured")
    else:
        return True
    return False


def _replace(
    handler: Any, networks: dict[str, Any], wanted: wire.Preparation, *, compiled: bool, graphed: bool
) -> list[GraphedModule]:
    """Put quicker ones into the handler's attributes; the graphs among them."""
    graphs = []
    recorder = CudaGraphs() if graphed else None
    for name, network in networks.items():
        quick = sys.modules["torch"].compile(network) if compiled else network
        if recorder is not None:
            quick = GraphedModule(quick, wanted.cuda_graphs, recorder, warn)
            graphs.append(quick)
        setattr(handler, name, quick)
    return graphs
