"""Magnitude pruning: thresholds, masks, records, curves, checkpoints."""

from wcr_fast.pruning.batchnorm import recalibrate_batchnorm
from wcr_fast.pruning.curve import PrunePoint, PruningCurve, pruning_curve
from wcr_fast.pruning.export import ExportRecord, export_checkpoint, load_exported, restore_checkpoint
from wcr_fast.pruning.magnitude import magnitude_masks, magnitude_threshold
from wcr_fast.pruning.masks import Masks
from wcr_fast.pruning.prune import prune_
from wcr_fast.pruning.record import LayerRecord, PruneRecord
from wcr_fast.pruning.scores import column_norms, score_masks
from wcr_fast.pruning.torch_prune import dense_state_dict

__all__ = [
    "ExportRecord",
    "LayerRecord",
    "Masks",
    "PrunePoint",
    "PruneRecord",
    "PruningCurve",
    "column_norms",
    "dense_state_dict",
    "export_checkpoint",
    "load_exported",
    "magnitude_masks",
    "magnitude_threshold",
    "prune_",
    "pruning_curve",
    "recalibrate_batchnorm",
    "restore_checkpoint",
    "score_masks",
]
