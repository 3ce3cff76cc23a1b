"""Which tensors count as weights: one choice for penalties and for pruning."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Weights = Tensor | nn.Module | Iterable[Tensor]
Exclude = str | type | Callable[[str, Tensor], bool] | Iterable["str | type | Callable[[str, Tensor], bool]"]


@dataclass(frozen=True)
class Weight:
    """One weight tensor with all its names and the dimensions of its outputs and inputs."""

    name: str
    param: Tensor
    names: tuple[str, ...] = ()
    out_dim: int = 0
    in_dim: int = -1
    owner: tuple[nn.Module, str] | None = None
    groups: int = 1  # of a transposed convolution: inputs and outputs fall into so many independent parts
    sharded: bool = False  # it may be a DTensor, or become one

    def current(self) -> Tensor:
        """Return the module's parameter as it is now: it may have been replaced since the choice."""
        if self.owner is None:
            return self.param
        module, attribute = self.owner
        param = module._parameters.get(attribute)
        if param is None:
            raise RuntimeError(f"{self.name} is no longer a parameter of its module: choose the weights again")
        if param is not self.param:
            if hasattr(self.param, "device_mesh") and not hasattr(param, "device_mesh"):
                return self.param  # FSDP2 has gathered it for a while: gradients and optimizers belong to the shards
            check_plain(param, self.name, sharded=self.sharded)
            if param.numel() != self.param.numel():
                raise RuntimeError(
                    f"{self.name} was replaced by a parameter of another size, {tuple(param.shape)}: choose again"
                )
        return param

    def label(self) -> str:
        """Return all names, for messages and records."""
        return " = ".join(self.names) if self.names else self.name


@dataclass(frozen=True)
class Choice:
    """The weights chosen from a module, and what was left out with the reason."""

    weights: list[Weight]
    left_out: list[tuple[str, str]] = field(default_factory=list)


# torch's own by class; third-party ones (LlamaRMSNorm, GemmaRMSNorm, ...) share no base class but the name's ending.
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_NAME = re.compile(r".*norm(\d+d)?", re.IGNORECASE)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or _NORM_NAME.fullmatch(type(module).__name__) is not None


def _dims(module: nn.Module, param: Tensor) -> tuple[int, int]:
    """Return (output dimension, input dimension) of a weight of this module."""
    if param.dim() < 2:
        return 0, -1
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 1, 0
    if type(module).__name__ == "Conv1D" and param.dim() == 2:  # transformers' linear layer, stored transposed
        return 1, 0
    return 0, 1


def _groups(module: nn.Module) -> int:
    """Return into how many parts a transposed convolution's inputs fall: its weight has them all in one dimension."""
    return module.groups if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1


def tensor_dims(tensor: Tensor) -> tuple[int, int]:
    """Return (output, input) dimensions of a bare tensor: those of a linear or convolution weight."""
    return (0, 1) if tensor.dim() >= 2 else (0, -1)


class Excluder:
    """Matches names against globs, ``re:`` patterns, module types and predicates; remembers what matched."""

    def __init__(self, exclude: Exclude) -> None:
        if not isinstance(exclude, Iterable) and not callable(exclude):
            raise TypeError(f"exclude takes patterns, module types or functions, got {type(exclude).__name__}")
        rules = [exclude] if isinstance(exclude, str) or callable(exclude) else list(exclude)
        self.patterns: dict[str, re.Pattern[str]] = {}
        self.types: list[type] = []
        self.predicates: list[Callable[[str, Tensor], bool]] = []
        for rule in rules:
            if isinstance(rule, str):
                source = rule[3:] if rule.startswith("re:") else fnmatch.translate(rule)
                try:
                    self.patterns[rule] = re.compile(source)
                except re.error as error:
                    raise ValueError(f"exclude: {rule!r} is not a regular expression: {error}") from None
            elif isinstance(rule, type):
                self.types.append(rule)
            elif callable(rule):
                self.predicates.append(rule)
            else:
                raise TypeError(f"exclude takes patterns, module types or functions, got {type(rule).__name__}")
        self.matched: set[str] = set()

    def reason(self, name: str, modules: Iterable[nn.Module], param: Tensor | None) -> str | None:
        """Return why a name is left out, or None.

        A pattern may match the name of any module around it, and a type any of these modules, outermost first.
        """
        parts = name.split(".")
        candidates = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        hits = [rule for rule, pattern in self.patterns.items() if any(pattern.fullmatch(c) for c in candidates)]
        self.matched.update(hits)
        if hits:
            return f"excluded by {hits[0]!r}"
        for kind in self.types:
            if any(isinstance(module, kind) for module in modules):
                return f"excluded as {kind.__name__}"
        if any(predicate(name, param) for predicate in self.predicates):
            return "excluded by a function"
        return None

    def __bool__(self) -> bool:
        return bool(self.patterns or self.types or self.predicates)

    def check_all_matched(self, known: list[str]) -> None:
        """Raise ValueError for a pattern that matched none of the names seen, listing the known ones."""
        unused = [rule for rule in self.patterns if rule not in self.matched]
        if unused:
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise ValueError(f"exclude: {unused[0]!r} matches no parameter; there are: {shown or 'none'}")


def _unfit(module: nn.Module, param: Tensor, trainable: bool) -> str | None:
    if not param.is_floating_point() or param.element_size() < 2:
        return f"dtype {param.dtype}"
    if param.dim() < 2:
        return f"{param.dim()}-d"
    if param.numel() == 0:
        return "empty"
    if _is_norm(module):
        return f"normalisation ({type(module).__name__})"
    if trainable and not param.requires_grad:
        return "frozen"
    return None


def choose(model: nn.Module, *, exclude: Exclude = (), trainable: bool = False, sharded: bool = False) -> Choice:
    """Choose a module's weights: floating point, two or more dimensions, not of a normalisation module.

    Args:
        model: any module; a parameter shared by several modules counts once, under all its names.
        exclude: glob patterns over parameter or module names, ``"re:..."`` for regular expressions (full
            match), module types, or functions of (name, parameter); one of them or several.
        trainable: also ask for ``requires_grad`` (penalties do, pruning doesn't).
        sharded: take DTensors too.

    Returns:
        The choice, in the order of ``model.named_parameters()``.

    Raises:
        ValueError: when a pattern matches no parameter's name, or parameters are empty placeholders.
    """
    excluder = Excluder(exclude)
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, list[tuple[str, nn.Module, Tensor]]] = {}
    for prefix, module in modules.items():
        for local, param in module.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            owners.setdefault(id(param), []).append((name, module, param))

    def around(name: str) -> list[nn.Module]:
        parts = name.split(".")
        return [modules[".".join(parts[:i])] for i in range(len(parts))]

    choice = Choice([])
    known: list[str] = []
    for uses in owners.values():
        names = tuple(name for name, _, _ in uses)
        known.extend(names)
        param = uses[0][2]
        reasons = [excluder.reason(name, around(name), param) for name in names]
        reason = next((r for r in reasons if r), None)
        if reason is None:
            check_plain(param, names[0], sharded=sharded)
        reason = reason or next((r for _, module, _ in uses if (r := _unfit(module, param, trainable))), None)
        if reason:
            choice.left_out.append((" = ".join(names), reason))
        else:
            out_dim, in_dim = _dims(uses[0][1], param)
            owner = (uses[0][1], uses[0][0].rpartition(".")[2])
            groups = _groups(uses[0][1])
            choice.weights.append(Weight(names[0], param, names, out_dim, in_dim, owner, groups, sharded))
    excluder.check_all_matched(known)
    return choice


def check_plain(tensor: Tensor, name: str, *, sharded: bool = False) -> None:
    """Raise when a tensor is not a plain dense tensor (or, if so asked, a DTensor) with its values at hand."""
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise ValueError(f"{name} is not initialised yet: run one batch through the lazy module first")
    if hasattr(tensor, "ds_id") or type(tensor).__name__ == "FlatParameter":
        raise ValueError(
            f"{name} is a placeholder or a flat parameter (ZeRO-3, FSDP1): its layers can't be told apart; "
            "gather the parameters first, or use FSDP2"
        )
    if hasattr(tensor, "device_mesh"):
        if sharded:
            partial = next((p for p in tensor.placements if p.is_partial()), None)
            if partial is None:
                return
            raise TypeError(f"{name} is a DTensor with placement {partial}, sums still to be made: redistribute it")
        raise TypeError(f"{name} is a DTensor: sharded parameters are not supported yet; pass full tensors")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}: only dense (strided) tensors are supported")


def as_weights(
    weights: Weights, *, op: str, exclude: Exclude = (), trainable: bool = False, sharded: bool = False
) -> list[Weight]:
    """Turn a tensor, a module or an iterable of tensors into a list of weights.

    A module is filtered by :func:`choose`; tensors are taken literally and named by their position, or by the names
    that come with them (``model.named_parameters()``).
    Raises TypeError for anything that isn't a real floating-point tensor, naming op and position.
    """
    if isinstance(weights, nn.Module):
        return choose(weights, exclude=exclude, trainable=trainable, sharded=sharded).weights
    if Excluder(exclude):
        raise ValueError(f"{op}: exclude needs a module; leave the tensors out of the list instead")
    if isinstance(weights, Mapping):
        raise TypeError(f"{op}: weights must be a model or tensors, got {type(weights).__name__}: give its .items()")
    single = isinstance(weights, Tensor)
    if not isinstance(weights, Iterable):
        raise TypeError(f"{op}: weights must be a tensor, a module or an iterable, got {type(weights).__name__}")
    listed: list[Weight] = []
    for i, tensor in enumerate([weights] if single else weights):
        name = "weights" if single else f"weights[{i}]"
        if isinstance(tensor, tuple) and len(tensor) == 2 and isinstance(tensor[0], str):
            name, tensor = tensor
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        check_plain(tensor, f"{op}: {name}", sharded=sharded)
        listed.append(Weight(name, tensor, (name,), *tensor_dims(tensor), sharded=sharded))
    if not torch.compiler.is_compiling():
        _warn_about_biases(listed, op)
    return listed


def _warn_about_biases(listed: list[Weight], op: str) -> None:
    flat = [w.name for w in listed if isinstance(w.param, nn.Parameter) and w.param.dim() < 2]
    if flat and len(listed) > len(flat):
        warnings.warn(
            f"{op}: {flat[0]} is a 1-d Parameter (a bias or a norm's gain) and counts as a layer here; "
            "pass the module itself, or only parameters with two or more dimensions",
            stacklevel=4,
        )
