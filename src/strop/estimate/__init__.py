"""What a run will need: memory and time, from its configuration and the lengths of its rows. Floor 5.

devices    how the model lies on the devices, and what they exchange
memory     bytes of the micro-batch that takes the most, on each device
longest    the longest group that a device takes
flops      floating-point operations of micro-batches
seconds    seconds of every step
speed      how fast this processor trains an architecture, measured with few layers
fitting    size of micro-batches, checkpointing and dtype, so that the memory suffices
run_estimate   all of it together, and in words

No weight is loaded and no GPU is touched: the model is built on torch's meta device, and a GPU's size is asked of its
driver's tool. `make bench` measures the errors.
"""

from strop.estimate.fitting import fitted, planned_precision, planned_rows, with_precision
from strop.estimate.flops import group_cost
from strop.estimate.run_estimate import LEFT_OUT, Estimate, estimate, longest_line, predicted_time, prediction

__all__ = [
    "LEFT_OUT",
    "Estimate",
    "estimate",
    "fitted",
    "group_cost",
    "longest_line",
    "planned_precision",
    "planned_rows",
    "predicted_time",
    "prediction",
    "with_precision",
]
