"""Masks that stay: which weights are removed, 1 bit each, by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wcr_fast.attach import unwrap
from wcr_fast.ops import select
from wcr_fast.ops.sharded import is_sharded, local
from wcr_fast.ops.shards import like_shard
from wcr_fast.pruning import mask_file, torch_prune
from wcr_fast.pruning.keep import KeepHandle, enforce_, words_of
from wcr_fast.pruning.named import Named, check_fits, find, listed, optimizer_names, recalled, remember
from wcr_fast.pruning.prune import chosen, warn_of_emptied
from wcr_fast.pruning.ranking import Aux, Bound, Ranking
from wcr_fast.score import Score
from wcr_fast.torch_path import bits
from wcr_fast.weights import Exclude, Weight, Weights, as_weights, choose


class Masks:
    """Which weights of a model are removed: 1 bit per weight, by the names of its parameters.

    Made by one of the ``from_`` methods or by ``load``; never changes. Holds no weight and is held by none: names,
    ``state_dict`` and copies of the model stay what they are. ``masks[name]`` is a layer's mask (bool, True = kept,
    in the weight's shape), ``list(masks)`` the names. Can be pickled and copied.

    Attributes:
        kept: weights that stay, over all layers.
        total: weights in all layers.
        sparsity: the fraction removed.
        weights_sha256: for loaded masks the hash in their file, see ``digest``; else None.

    Example:
        >>> import torch, wcr_fast
        >>> model = torch.nn.Linear(10, 10)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> masks = Masks.from_sparsity(model, 0.9)
        >>> handle = masks.keep(optimizer)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()
        >>> int(model.weight.count_nonzero())
        10
    """

    def __init__(
        self, layers: Mapping[str, tuple[Tensor, torch.Size]], *, source: Any = None, weights_sha256: str | None = None
    ) -> None:
        self._layers = dict(layers)  # name -> plain bits, shape
        self._source = remember(source)
        self.weights_sha256 = weights_sha256

    @classmethod
    def from_model(cls, model: Weights, *, exclude: Exclude = ()) -> Masks:
        """Take what is zero in a model for removed, in its weights as :func:`wcr_fast.prune_` chooses them.

        Args:
            model: a module, a tensor, or tensors (named ``weights[0]``, ...).
            exclude: name patterns, module types or functions: what to leave out of a module.

        Raises:
            ValueError: nothing to prune, a pattern that matches nothing, or a module under torch.nn.utils.prune.

        Example:
            >>> import torch, wcr_fast
            >>> model = torch.nn.Linear(4, 4)
            >>> record = wcr_fast.prune_(model, 0.5)
            >>> Masks.from_model(model)
            Masks(1 layer, 8 of 16 weights kept, sparsity 0.5000)
        """
        op, model = "from_model", listed(model)
        if isinstance(model, nn.Module):
            _refuse_torch_prune(model, op)
        weights, _ = chosen(model, exclude, op)
        return cls({w.name: (_packed(w.param, lambda x: x != 0), w.param.shape) for w in weights}, source=model)

    @classmethod
    def from_sparsity(
        cls,
        model: Weights,
        sparsity: float | None,
        scope: str = "global",
        *,
        exclude: Exclude = (),
        score: str | Score = "magnitude",
        aux: Aux = None,
        floor: Bound = None,
        cap: Bound = None,
    ) -> Masks:
        """Select the largest magnitudes, or other scores, exactly: the arguments of :func:`wcr_fast.score_masks`.

        Waits for the device. Warns where a layer would lose all its weights.

        Raises:
            ValueError: as ``from_model``, for NaN (naming the parameter), a wrong sparsity or scope, and as
                :func:`wcr_fast.score_masks`.

        Example:
            >>> import torch
            >>> Masks.from_sparsity(torch.nn.Linear(4, 4), None, "2:4").kept
            8
        """
        op, model = "from_sparsity", listed(model)
        value = 0.0 if select.check_scope(scope, sparsity, op) else select.check_sparsity(sparsity, op)
        weights, _ = chosen(model, exclude, op)
        ranking = Ranking.of(weights, scope, op, score=score, aux=aux, floor=floor, cap=cap)
        if ranking is None:
            _refuse_nan(weights, op)
            found = select.masks(weights, value, scope)
        else:
            found = ranking.masks(weights, value, scope, op)
        made = cls({w.name: (_packed(m), m.shape) for w, m in zip(weights, found, strict=True)}, source=model)
        made._warn_of_emptied(op)
        return made

    @classmethod
    def from_threshold(cls, model: Weights, threshold: float | Tensor, *, exclude: Exclude = ()) -> Masks:
        """Keep every weight with a magnitude of at least ``threshold``, compared in float64; ``kept`` says how many.

        With ties there may be more than was asked of the threshold: ``from_sparsity`` is exact. Warns where a layer
        would lose all its weights.

        Raises:
            ValueError: as ``from_model``, for NaN (naming the parameter), or a threshold that is NaN or negative.

        Example:
            >>> import torch
            >>> Masks.from_threshold([torch.tensor([1.0, -3.0, 2.0, 2.0])], 2.0).kept
            3
        """
        op, model = "from_threshold", listed(model)
        cut = float(threshold)
        if not cut >= 0:
            raise ValueError(f"{op}: threshold must be a magnitude, 0 or more, got {cut}")
        weights, _ = chosen(model, exclude, op)
        _refuse_nan(weights, op)
        layers = {
            w.name: (_packed(w.param, lambda x: x.to(torch.float64).abs() >= cut), w.param.shape) for w in weights
        }
        made = cls(layers, source=model)
        made._warn_of_emptied("from_threshold")
        return made

    @classmethod
    def from_masks(
        cls, masks: Mapping[str, Tensor] | Iterable[Tensor], model: Named | None = None, *, exclude: Exclude = ()
    ) -> Masks:
        """Take masks as they are: bool tensors, True = kept.

        Args:
            masks: by parameter name; or in the order of the model's weights, as :func:`wcr_fast.magnitude_masks`
                returns them.
            model: the module or tensors they are for. With masks by name it may be left out: names and shapes are
                then checked when they are used.
            exclude: what was left out of the module.

        Raises:
            TypeError: a mask that isn't bool. ValueError: another number of masks than of weights, a shape that
                differs, a name that is no parameter.

        Example:
            >>> import torch
            >>> Masks.from_masks({"0.weight": torch.tensor([[True, False]])})["0.weight"]
            tensor([[ True, False]])
        """
        op, model = "from_masks", listed(model)
        if isinstance(masks, Mapping):
            named = dict(masks)
        elif model is None:
            raise ValueError(f"{op}: masks without names need their model: from_masks(masks, model)")
        else:
            named = _by_place(list(masks), as_weights(model, op=op, exclude=exclude, sharded=True), op)
        for name, mask in named.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"{op}: the mask of {name} must be a bool tensor (True = kept), got {got}")
        made = cls({name: (_packed(mask), mask.shape) for name, mask in named.items()}, source=model)
        if model is not None:
            made._find(model, op)
        return made

    @classmethod
    def from_torch_prune(cls, state_dict: Mapping[str, Tensor]) -> Masks:
        """Read the masks out of the ``state_dict`` of a model under ``torch.nn.utils.prune``.

        Each pair ``NAME_orig``, ``NAME_mask`` gives a mask NAME, kept where it isn't zero.

        Raises:
            ValueError: when there is no such pair, or shapes differ.

        Example:
            >>> import torch
            >>> from torch.nn.utils import prune
            >>> model = torch.nn.Linear(4, 4)
            >>> _ = prune.l1_unstructured(model, "weight", 0.25)
            >>> Masks.from_torch_prune(model.state_dict())
            Masks(1 layer, 12 of 16 weights kept, sparsity 0.2500)
        """
        pairs = torch_prune.pairs(state_dict)
        return cls({name: (bits.pack(mask, lambda x: x != 0), mask.shape) for name, (_, mask) in pairs.items()})

    def to_torch_prune(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the ``state_dict`` that the same model has under ``torch.nn.utils.prune`` with these masks.

        The values under the masks are kept, as torch does; :func:`wcr_fast.pruning.dense_state_dict` is the way back.

        Raises:
            ValueError: for names that are missing and shapes that differ.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(4, 4)
            >>> sorted(Masks.from_sparsity(model, 0.75).to_torch_prune(model.state_dict()))
            ['bias', 'weight_mask', 'weight_orig']
        """
        self._find(state_dict, "to_torch_prune")
        masks = {name: self[name].to(state_dict[name]) for name in self}
        return torch_prune.wrapped(state_dict, masks)

    @cached_property
    def kept(self) -> int:
        return sum(bits.count(packed) for packed, _ in self._layers.values())

    @property
    def total(self) -> int:
        return sum(math.prod(shape) for _, shape in self._layers.values())

    @property
    def sparsity(self) -> float:
        return 1.0 - self.kept / self.total if self.total else 0.0

    def __getitem__(self, name: str) -> Tensor:
        packed, shape = self._layers[name]
        return bits.unpack(packed, math.prod(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def keys(self) -> KeysView[str]:
        """Return the names: ``dict(masks)`` has all masks."""
        return self._layers.keys()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Return names and masks, each unpacked when its turn comes."""
        return ((name, self[name]) for name in self)

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __repr__(self) -> str:
        layers = f"{len(self)} layer{'' if len(self) == 1 else 's'}"
        return f"Masks({layers}, {self.kept:,} of {self.total:,} weights kept, sparsity {self.sparsity:.4f})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}

    def apply_(self, model: Named) -> None:
        """Set the removed weights of a model to +0.0, in place.

        Args:
            model: a module with parameters of these names (this one, or an averaged copy: wrappers such as
                AveragedModel, DistributedDataParallel and compiled modules are looked into), a ``state_dict``, or
                the list of tensors that the masks were made from. Of a DTensor each rank writes its shard.

        Raises:
            ValueError: before anything is written: a missing name, another shape, a weight that can't be written.
            TypeError: a weight that isn't a plain tensor of real floating-point numbers.

        Example:
            >>> import copy, torch
            >>> model = torch.nn.Linear(4, 4)
            >>> average = copy.deepcopy(model)
            >>> Masks.from_sparsity(model, 0.75).apply_(average)
            >>> int(average.weight.count_nonzero())
            4
        """
        weights = self._find(model, "apply_")
        params = [w.param for w in weights]
        enforce_(params, [words_of(self._layers[w.name][0], w.param) for w in weights])

    def keep(self, optimizer: Any, model: Named | None = None) -> KeepHandle:
        """Keep the removed weights at zero from now on, with their momentum and other state.

        They are zeroed at once, and then by every step: inside of it for ``wcr_fast.optim``'s optimizers, right
        after it for any other. So not one is ever non-zero when the model is used, whatever weight decay, momentum
        of former steps, a GradScaler or clipping do. After a resume, call ``keep`` again on the new optimizer.

        Args:
            optimizer: a torch optimizer, or a wrapper that holds one as ``.optimizer``.
            model: the model that it trains; default the one that these masks were made from, or else the names
                that the optimizer has for its parameters (``SGD(model.named_parameters())``). Weights that the
                optimizer doesn't own are left to others.

        Returns:
            A handle: ``remove()`` ends it; also a context manager.

        Raises:
            ValueError: when the optimizer owns none of the weights, or keeps one already; as ``apply_`` for names
                and shapes. TypeError: for anything that isn't a torch optimizer.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(4, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            >>> with Masks.from_sparsity(model, 0.75).keep(optimizer):
            ...     model(torch.ones(2, 4)).sum().backward()
            ...     optimizer.step()
            >>> int(model.weight.count_nonzero())
            4
        """
        base = unwrap(optimizer, "keep")
        target = model if model is not None else recalled(self._source)
        if target is None:
            named = optimizer_names(base)
            target = {name: param for name, param in named.items() if name in self}
            if not target:
                raise ValueError(
                    "keep: these masks know parameters by name only, the optimizer doesn't; name the model: "
                    "keep(optimizer, model)"
                )
            weights = [w for name in target for w in self._find(target, "keep", [name])]
        else:
            weights = self._find(target, "keep")
        return KeepHandle(base, weights, [self._layers[w.name][0] for w in weights])

    def digest(self, model: Named) -> str:
        """Return the SHA-256 of a model's masked weights, the removed ones taken for +0.0.

        So it is the same before and after ``apply_``, and tells whether masks and weights belong together: compare
        it with ``weights_sha256`` of loaded masks. Over the layers in order of their names: the JSON text
        ``[name, dtype, shape]``, then the values' little-endian bytes in row-major order.

        Raises:
            ValueError, TypeError: as ``apply_``.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(4, 4)
            >>> masks = Masks.from_sparsity(model, 0.75)
            >>> before = masks.digest(model)
            >>> masks.apply_(model)
            >>> masks.digest(model) == before
            True
        """
        weights = {w.name: w.param for w in self._find(model, "digest")}
        sha = hashlib.sha256()
        for name in sorted(weights):
            whole = weights[name].full_tensor() if is_sharded(weights[name]) else weights[name]
            values = whole.detach().cpu().clone(memory_format=torch.contiguous_format)
            enforce_([values], [words_of(self._layers[name][0], values)])
            kind = str(values.dtype).removeprefix("torch.")
            sha.update(json.dumps([name, kind, list(values.shape)]).encode())
            sha.update(memoryview(values.view(-1).view(torch.uint8).numpy()))
        return sha.hexdigest()

    def save(self, path: str | Path, model: Named | None = None) -> None:
        """Write a safetensors file: 1 bit per weight, one uint8 tensor per layer under its name.

        It appears whole or not at all, and replaces an existing one. docs/mask-format.md has the format.

        Args:
            path: the file.
            model: the weights whose ``digest`` is written with them; default the model that these masks were made
                from, as it is now. Without either, loaded masks keep the hash they came with.

        Raises:
            UsageError (a ValueError): when the file can't be written. ValueError, TypeError: as ``apply_``.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(4, 4)
            >>> Masks.from_sparsity(model, 0.75).save("masks.safetensors")
            >>> masks = Masks.load("masks.safetensors")
            >>> masks.kept, masks.digest(model) == masks.weights_sha256
            (4, True)
        """
        target = model if model is not None else recalled(self._source)
        sha256 = self.weights_sha256 if target is None else self.digest(target)
        mask_file.write(Path(path), self._layers, sha256)

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read masks that ``save`` wrote.

        Raises:
            UsageError (a ValueError): when the file is missing, damaged, or no file of masks.
        """
        layers, sha256 = mask_file.read(Path(path))
        return cls(layers, weights_sha256=sha256)

    def _warn_of_emptied(self, op: str) -> None:
        warn_of_emptied([name for name, (packed, _) in self._layers.items() if not packed.any()], op, stacklevel=4)

    def _find(self, target: Named, op: str, names: Iterable[str] | None = None) -> list[Weight]:
        """Return the weights of a model, in the masks' order; raise when one is missing or can't have its mask."""
        found = find(target, list(self if names is None else names), op)
        first: dict[int, str] = {}
        for name, weight in found.items():
            check_fits(weight, self._layers[name][1], op)
            other = first.setdefault(id(weight.param), name)
            if not torch.equal(self._layers[other][0], self._layers[name][0]):
                raise ValueError(f"{op}: {other} and {name} are one parameter, their masks differ")
        return [found[name] for name in first.values()]


def _packed(tensor: Tensor, test: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Pack a mask, or ``test`` of a weight; of a DTensor every process gets the bits of all shards."""
    if not is_sharded(tensor):
        return bits.pack(tensor, test)
    flags = local(tensor).detach() if test is None else test(local(tensor).detach())
    return bits.pack(like_shard(flags.contiguous().view(torch.uint8), tensor).full_tensor().view(torch.bool))


def _by_place(masks: Sequence[Tensor], weights: Sequence[Weight], op: str) -> dict[str, Tensor]:
    if len(masks) != len(weights):
        raise ValueError(
            f"{op}: {len(masks)} masks for {len(weights)} weights: {', '.join(w.name for w in weights[:8])}"
        )
    return {w.name: m for w, m in zip(weights, masks, strict=True)}


def _refuse_nan(weights: Sequence[Weight], op: str) -> None:
    _, bad = select.survey([w.param.detach() for w in weights])
    select.raise_on_nan(bad, [w.label() for w in weights], op)


def _refuse_torch_prune(model: nn.Module, op: str) -> None:
    for weight in choose(model, sharded=True).weights:
        if weight.name.endswith("_orig") and weight.owner is not None:
            module, attribute = weight.owner
            if attribute.removesuffix("orig") + "mask" in module._buffers:
                raise ValueError(
                    f"{op}: {weight.name} is under torch.nn.utils.prune: use Masks.from_torch_prune(model.state_dict())"
                )
