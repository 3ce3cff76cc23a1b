"""Penalties on weights: the moments family, sums of penalties, groups, and what makes strengths change in time.

Each adds to the loss (call it), adds its gradient directly (``add_grad_``), or does so before every optimizer step
(``attach``).
"""

from wcr_fast.regularizers.base import FromMoments, Regularizer
from wcr_fast.regularizers.family import (
    L1,
    L2,
    VAR,
    WCR,
    HoyerSquare,
    LogConcentration,
    RelativeConcentration,
)
from wcr_fast.regularizers.groups import GroupHoyerSquare, GroupLasso
from wcr_fast.regularizers.strength import StrengthSchedule
from wcr_fast.regularizers.terms import Sum, Term

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
    "Regularizer",
    "RelativeConcentration",
    "StrengthSchedule",
    "Sum",
    "Term",
]
