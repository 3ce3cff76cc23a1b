"""Thresholds of weights that an optimizer steps, on Triton: the step counts, the search reads what it counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_fast.kernels.track import first_width, launch_rearm
from wcr_fast.table import keep_for_graph, on_device
from wcr_fast.torch_path.cuts import Cuts
from wcr_fast.triton_path.cuts import Search, in_any_order


class Tracker:
    """The windows around the last cuts of a list of tensors, not all empty, on one device; and what a step counted.

    Attributes:
        dtype: the dtype in which the weights are compared.
        counters: what a step counts in: the windows' state, their histograms, and the flag of NaN.
    """

    def __init__(self, tensors: Sequence[Tensor], num_keep: Sequence[int]) -> None:
        self._num_keep = list(num_keep)
        self._device = tensors[0].device
        self._warm = torch.zeros(2 * len(self._num_keep), dtype=torch.int64, device=self._device)
        with on_device(self._device):
            search = self._search(tensors)
            self.dtype = search.dtype
            self.counters = search.state, search.histograms(), search.bad[:1].clone()
        self.cuts(tensors, counted=False)  # so the first step knows where to look

    def _search(self, tensors: Sequence[Tensor]) -> Search:
        return Search.of([in_any_order(t) for t in tensors], [self._num_keep], sampled=True, warm=self._warm)

    def rearm(self) -> None:
        """Make ready for the counts of the next step."""
        with on_device(self._device):
            launch_rearm(*self.counters, self._warm, key_dtype=self.dtype)

    def cuts(self, tensors: Sequence[Tensor], *, counted: bool) -> Cuts:
        """Return the cuts of these tensors; ``counted``: the last step counted them as they are.

        ``bad`` then is of the list as a whole, bool [1].
        """
        state, hist, bad = self.counters
        keep_for_graph(self._device, self)
        with on_device(self._device):
            search = self._search(tensors)
            if counted:
                search = dataclasses.replace(search, state=state, bad=bad)
                search.settle(hist)
            else:
                search.run()
                # A step counts in narrower windows than a pass; those it misses double in width.
                self._warm[1::2] = first_width(self.dtype)
            return search.found()
