"""The modules from which handlers of MMS and TorchServe import what they give to `context.metrics`.

They exist in worker processes only, and by their full names only: `import ts` still tells that there is no TorchServe.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from mms.handler_metrics import Dimension, MetricTypes, Units

_MODULES: dict[str, dict[str, Any]] = {
    "mms.metrics.dimension": {"Dimension": Dimension},
    "mms.metrics.unit": {"Units": Units},
    "ts.metrics.dimension": {"Dimension": Dimension},
    "ts.metrics.unit": {"Units": Units},
    "ts.metrics.metric_type_enum": {"MetricTypes": MetricTypes},
    "ts.metrics.metric_cache_errors": {
        "MetricsCacheKeyError": KeyError,
        "MetricsCacheTypeError": TypeError,
        "MetricsCacheValueError": ValueError,
    },
}


def provide() -> None:
    """Let a handler import them."""
    for name, members in _MODULES.items():
        module = ModuleType(name, "Provided by this server for handlers of MMS and TorchServe.")
        vars(module).update(members)
        sys.modules.setdefault(name, module)
