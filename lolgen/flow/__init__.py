"""Flow matching on balanced latents: paths from noise to data, the loss, ODE solvers. Knows tensors only."""

from __future__ import annotations

from lolgen.flow.loss import drop_condition, flow_loss, sample_t
from lolgen.flow.path import PathSample, align, column_mask, gaussian, linear_path
from lolgen.flow.solver import guided, solve

__all__ = [
    "PathSample",
    "align",
    "column_mask",
    "drop_condition",
    "flow_loss",
    "gaussian",
    "guided",
    "linear_path",
    "sample_t",
    "solve",
]
