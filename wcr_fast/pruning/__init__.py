"""Magnitude pruning: thresholds, masks, records, curves, checkpoints."""

from wcr_fast.pruning.batchnorm import recalibrate_batchnorm
from wcr_fast.pruning.curve import PrunePoint, PruningCurve, pruning_curve
from wcr_fast.pruning.magnitude import magnitude_masks, magnitude_threshold
from wcr_fast.pruning.prune import prune_
from wcr_fast.pruning.record import LayerRecord, PruneRecord

__all__ = [
    "LayerRecord",
    "PrunePoint",
    "PruneRecord",
    "PruningCurve",
    "magnitude_masks",
    "magnitude_threshold",
    "prune_",
    "pruning_curve",
    "recalibrate_batchnorm",
]
