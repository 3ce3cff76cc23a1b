"""Fast and exact weight-concentration penalties and magnitude pruning for PyTorch."""

from wcr_fast import optim
from wcr_fast.backend import backend
from wcr_fast.ops.moments import concentration_penalty, layer_moments
from wcr_fast.pruning import (
    Masks,
    PruneRecord,
    PruningCurve,
    column_norms,
    load_exported,
    magnitude_masks,
    magnitude_threshold,
    prune_,
    pruning_curve,
    recalibrate_batchnorm,
    score_masks,
)
from wcr_fast.regularizers import (
    L1,
    L2,
    VAR,
    WCR,
    FromMoments,
    GroupHoyerSquare,
    GroupLasso,
    HoyerSquare,
    LogConcentration,
    Regularizer,
    RelativeConcentration,
    StrengthSchedule,
    Sum,
)
from wcr_fast.score import Score

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L2",
    "VAR",
    "WCR",
    "FromMoments",
    "GroupHoyerSquare",
    "GroupLasso",
    "HoyerSquare",
    "LogConcentration",
    "Masks",
    "PruneRecord",
    "PruningCurve",
    "Regularizer",
    "RelativeConcentration",
    "Score",
    "StrengthSchedule",
    "Sum",
    "backend",
    "column_norms",
    "concentration_penalty",
    "layer_moments",
    "load_exported",
    "magnitude_masks",
    "magnitude_threshold",
    "optim",
    "prune_",
    "pruning_curve",
    "recalibrate_batchnorm",
    "score_masks",
]
