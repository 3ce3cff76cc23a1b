"""SAM, ASAM, CrAM and S2SAM written from their formulas, in float64 and with nothing of the package."""

import copy

import torch


def gradients(model, loss_of, at=None):
    """The gradients of a loss at other values of the parameters."""
    probe = copy.deepcopy(model)
    if at is not None:
        with torch.no_grad():
            for p, value in zip(probe.parameters(), at, strict=True):
                p.copy_(value)
    loss = loss_of(probe)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(
            probe.parameters(), torch.autograd.grad(loss, list(probe.parameters()), allow_unused=True), strict=True
        )
    ]


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def norm(tensors):
    return torch.sqrt(sum((t.double() ** 2).sum() for t in tensors))


def sam_point(w, g, rho):
    length = norm(g) + 1e-12
    return [a + rho * b / length for a, b in zip(w, g, strict=True)]


def asam_point(w, g, rho, eta, everything=False):
    t = [a.abs() + eta if everything or a.dim() > 1 else torch.ones_like(a) for a in w]
    length = norm([a * b for a, b in zip(t, g, strict=True)]) + 1e-12
    return [a + rho * b * b * c / length for a, b, c in zip(w, t, g, strict=True)]


def compressed(w, sparsity, scope="global"):
    """One-shot magnitude pruning of what has two or more dimensions; of equal magnitudes the first stay."""
    pools = [[i for i, a in enumerate(w) if a.dim() > 1]]
    if scope == "layer":
        pools = [[i] for i in pools[0]]
    out = [a.clone() for a in w]
    for pool in pools:
        flat = torch.cat([w[i].flatten() for i in pool])
        keep = flat.numel() - round(sparsity * flat.numel())
        stays = torch.zeros(flat.numel(), dtype=torch.bool)
        stays[torch.argsort(flat.abs(), descending=True, stable=True)[:keep]] = True
        for i, part in zip(pool, stays.split([w[i].numel() for i in pool]), strict=True):
            out[i][~part.view_as(w[i])] = 0.0
    return out


def cram_gradient(model, loss_of, rho, sparsity, *, plus, sparse_grad, scope="global"):
    w, g = values(model), gradients(model, loss_of)
    point = compressed([a + rho * b for a, b in zip(w, g, strict=True)], sparsity, scope)
    second = gradients(model, loss_of, point)
    if sparse_grad:
        second = [b * (a != 0) if a.dim() > 1 else b for a, b in zip(point, second, strict=True)]
    return [a + b for a, b in zip(second, g, strict=True)] if plus else second


def descend(optimizer, model, grads):
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
