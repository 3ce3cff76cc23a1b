"""Optimizers with the penalty, the mask and the next step's moments in their own step."""

from wcr_fast.optim.adamw import AdamW
from wcr_fast.optim.fused import FusedOptimizer
from wcr_fast.optim.sgd import SGD
from wcr_fast.optim.track import TrackedThreshold

__all__ = ["SGD", "AdamW", "FusedOptimizer", "TrackedThreshold"]
