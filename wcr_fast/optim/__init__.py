"""Optimizers: the penalty, the mask and the next step's moments in the step itself; and pruning-robust ones."""

from wcr_fast.optim.adamw import AdamW
from wcr_fast.optim.cram import CrAM, CrAMPlus
from wcr_fast.optim.fused import FusedOptimizer
from wcr_fast.optim.perturbed import PerturbedOptimizer
from wcr_fast.optim.s2sam import S2SAM
from wcr_fast.optim.sam import ASAM, SAM
from wcr_fast.optim.sgd import SGD
from wcr_fast.optim.track import TrackedThreshold
from wcr_fast.optim.two_pass import TwoPassOptimizer

__all__ = [
    "ASAM",
    "S2SAM",
    "SAM",
    "SGD",
    "AdamW",
    "CrAM",
    "CrAMPlus",
    "FusedOptimizer",
    "PerturbedOptimizer",
    "TrackedThreshold",
    "TwoPassOptimizer",
]
