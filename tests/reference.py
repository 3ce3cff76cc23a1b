"""Float64 references written from the formulas; torch only, independent of the package."""

import math

import torch


def magnitudes(w, r):
    w = w.detach().double()
    return w.abs() if r == 0 else torch.sqrt(w * w + r)


def moments(w, r):
    a = magnitudes(w, r)
    if a.numel() == 0:
        return torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    mean = a.mean()
    return mean, ((a - mean) ** 2).mean()


def penalty_term(family, w, total, eps, r):
    """f of one layer, from its values, differentiable with respect to w (float64)."""
    a = w.abs() if r == 0 else torch.sqrt(w * w + r)
    n = w.numel()
    if family == "l1":
        return a.sum()
    if family == "l2":
        return (a * a).sum() / 2
    mean = a.sum() / n
    var = ((a - mean) ** 2).sum() / n
    if family == "wcr":
        return 1.0 / (var + eps)
    if family == "hoyer_square":
        return a.sum() ** 2 / (a * a).sum()
    ratio = mean**2 / (var + eps * mean**2)
    if family == "relative":
        return ratio
    return n / total * torch.log(ratio)


def penalty_and_grads(family, weights, eps, r):
    """psi and its gradients by float64 autograd of the formula."""
    xs = [w.detach().double().clone().requires_grad_() for w in weights]
    total = sum(x.numel() for x in xs)
    psi = sum(penalty_term(family, x, total, eps, r) for x in xs)
    return psi.detach(), torch.autograd.grad(psi, xs)


def relative_error(got, want):
    """Largest error relative to the largest reference value: the scale rounding works on."""
    scale = want.abs().max().item() if want.numel() else 0.0
    if want.numel() == 0:
        return 0.0
    error = (got.double().cpu() - want.double().cpu()).abs().max().item()
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)
