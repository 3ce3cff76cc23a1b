"""Magnitude pruning: thresholds, masks, records, curves, checkpoints."""

from wcr_fast.pruning.batchnorm import recalibrate_batchnorm
from wcr_fast.pruning.curve import PrunePoint, PruningCurve, pruning_curve
from wcr_fast.pruning.magnitude import magnitude_masks, magnitude_threshold
from wcr_fast.pruning.masks import Masks
from wcr_fast.pruning.prune import prune_
from wcr_fast.pruning.record import LayerRecord, PruneRecord
from wcr_fast.pruning.torch_prune import dense_state_dict

__all__ = [
    "LayerRecord",
    "Masks",
    "PrunePoint",
    "PruneRecord",
    "PruningCurve",
    "dense_state_dict",
    "magnitude_masks",
    "magnitude_threshold",
    "prune_",
    "pruning_curve",
    "recalibrate_batchnorm",
]
