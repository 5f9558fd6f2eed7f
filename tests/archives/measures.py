"""Counts and measures with context.metrics, as handlers of MMS and TorchServe do; a body is an animal's name."""

from mms.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes


class Measures:
    def initialize(self, context):
        context.metrics.add_size("ModelSize", 3)
        self.length = context.metrics.add_metric_to_cache("Length", "B", ["Field"], MetricTypes.HISTOGRAM)

    def handle(self, data, context):
        for idx, row in enumerate(data):
            context.metrics.add_counter("Seen", 1, idx, [Dimension("Animal", row["body"].decode())])
            context.metrics.add_time("Look", 4, idx)
            self.length.add_or_update(len(row["body"]), ["body"], context.get_request_id(idx))
        return ["seen"] * len(data)
