"""SGD and AdamW in float64, written from their formulas, with a penalty's gradient by autograd; torch only."""

import torch
from reference import penalty_and_grads


def sgd(w, g, state, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
    """One step; state is {} or {"momentum_buffer": ...}. Returns (weight, state), float64."""
    w, g = w.double(), (-g if maximize else g).double()
    g = g + weight_decay * w
    if momentum:
        old = state.get("momentum_buffer")
        buffer = g if old is None else momentum * old.double() + (1 - dampening) * g
        state = {"momentum_buffer": buffer}
        g = g + momentum * buffer if nesterov else buffer
    return w - lr * g, state


def adamw(
    w, g, state, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, maximize=False, decoupled=None
):
    """One step; state is {} or holds exp_avg, exp_avg_sq, step. ``decoupled``: lam grad psi, outside the scaling."""
    w, g = w.double(), (-g if maximize else g).double()
    t = int(state.get("step", 0)) + 1
    m, v, top = (state.get(k, torch.zeros_like(w)).double() for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    top = torch.maximum(top, v)
    spread = ((top if amsgrad else v) / (1 - betas[1] ** t)).sqrt() + eps
    pull = 0.0 if decoupled is None else decoupled
    new = w - lr * (weight_decay * w + pull) - lr / (1 - betas[0] ** t) * m / spread
    state = {"exp_avg": m, "exp_avg_sq": v, "step": t}
    return new, {**state, "max_exp_avg_sq": top} if amsgrad else state


STEPS = {"sgd": sgd, "adamw": adamw}


class Trainer:
    """Trains copies of parameters in float64: gradients come from outside, the penalty's from its formula."""

    def __init__(self, algorithm, params, options, penalty=None, decoupled=False):
        self.algorithm, self.options = STEPS[algorithm], options
        self.params = [p.detach().double().clone() for p in params]
        self.states = [{} for _ in params]
        self.penalty, self.decoupled = penalty, decoupled  # (family, lam, eps, r, indices of the penalised)

    def step(self, grads):
        pulls = {}
        if self.penalty:
            family, lam, eps, r, places = self.penalty
            _, found = penalty_and_grads(family, [self.params[i] for i in places], eps, r)
            pulls = {i: lam * g for i, g in zip(places, found, strict=True)}
        for i, g in enumerate(grads):
            options = dict(self.options)
            if g is None and i not in pulls:
                continue
            g = torch.zeros_like(self.params[i]) if g is None else g.double()
            if self.decoupled:
                options["decoupled"] = pulls.get(i)
            elif i in pulls:
                g = g + pulls[i]
            self.params[i], self.states[i] = self.algorithm(self.params[i], g, self.states[i], **options)


def unit(x, dtype):
    """The distance from |x| to the next larger number of a dtype."""
    x = x.abs().to(dtype)
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}[dtype]
    return (x.view(kind) + 1).view(dtype).double() - x.double()
