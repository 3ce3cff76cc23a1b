"""The fused optimizers: steps against float64 references and torch's own, on both paths."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import DEVICE, TRITON_SKIP, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import magnitudes, penalty_and_grads
from reference_optim import STEPS, Trainer, unit
from torch import nn

import wcr_fast
from wcr_fast.optim import SGD, AdamW

OURS = {"sgd": SGD, "adamw": AdamW}
TORCHS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
STRENGTHS = {"wcr": 1e-5, "l1": 1e-4, "hoyer_square": 1e-3, "relative": 1e-3, "log": 1e-2}
REGULARIZERS = {
    kind.family: kind
    for kind in (
        wcr_fast.WCR,
        wcr_fast.L1,
        wcr_fast.HoyerSquare,
        wcr_fast.RelativeConcentration,
        wcr_fast.LogConcentration,
    )
}
OPTIONS = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "sgd plain": {"lr": 0.05},
    "sgd dampened": {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 1e-3},
    "sgd nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "maximize": True},
    "adamw": {"lr": 2e-3, "weight_decay": 1e-2},
    "adamw amsgrad": {"lr": 2e-3, "betas": (0.8, 0.95), "amsgrad": True, "weight_decay": 0.1},
    "adamw maximize": {"lr": 2e-3, "eps": 1e-6, "maximize": True},
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Small nets on several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net(dtype=torch.float32, device="cpu"):
    """A small real net, one weight in channels_last, whose moments are of ordinary size."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False).to(memory_format=torch.channels_last),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )
    return model.to(device, dtype)


def backward(model, optimizer, number):
    """One batch's loss gradients, the same for the same number; those of -loss where that is maximised."""
    generator = torch.Generator().manual_seed(number)
    p = next(model.parameters())
    x = torch.randn(8, 3, 6, 6, generator=generator).to(p.device, p.dtype)
    y = torch.randint(0, 5, (8,), generator=generator).to(p.device)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x).to(torch.float64 if p.dtype == torch.float64 else torch.float32), y)
    (-loss if optimizer.defaults["maximize"] else loss).backward()
    return loss


def train(model, optimizer, steps, start=0):
    for number in range(start, start + steps):
        backward(model, optimizer, number)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def penalised(params):
    return [i for i, p in enumerate(params) if p.dim() >= 2]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def error(first, second):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(first, second, strict=True))


def against_float64(name, family, device, steps, decoupled=False):
    """Train in float64, feed the same gradients to the reference, return the largest difference of weights."""
    algorithm, options = name.split()[0], OPTIONS[name]
    model = net(torch.float64, device)
    params = list(model.parameters())
    reg = REGULARIZERS[family](model) if family else None
    lam = STRENGTHS.get(family)
    if family and options.get("maximize"):
        lam = -lam  # of what is maximised
    extra = {"penalty": reg, "lam": lam} if family else {}
    if decoupled:
        extra["decoupled"] = True
    optimizer = OURS[algorithm](params, **options, **extra)
    chosen = (family, lam, reg.eps, reg.r, penalised(params)) if family else None
    trainer = Trainer(algorithm, [p.cpu() for p in params], options, chosen, decoupled)
    for number in range(steps):
        backward(model, optimizer, number)
        trainer.step([p.grad.cpu() for p in params])
        optimizer.step()
    return error([p.cpu() for p in params], trainer.params)


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in ("sgd", "adamw") for family in STRENGTHS]
    + [(name, family) for name in OPTIONS for family in (None, "hoyer_square")],
)
def test_300_steps_in_float64_equal_autograd(name, family):
    assert against_float64(name, family, "cpu", 300) < 1e-12


@pytest.mark.parametrize("family", STRENGTHS)
def test_decoupled_penalty_in_float64(family):
    assert against_float64("adamw", family, "cpu", 300, decoupled=True) < 1e-12


@pytest.mark.parametrize(
    ("name", "family", "decoupled"),
    [
        ("sgd", "wcr", False),
        ("sgd dampened", "hoyer_square", False),
        ("sgd nesterov", "l1", False),
        ("sgd plain", None, False),
        ("adamw", "wcr", False),
        ("adamw", "log", True),
        ("adamw amsgrad", "relative", False),
        ("adamw maximize", None, False),
    ],
)
def test_both_paths_in_float64(backend, device, name, family, decoupled):
    assert against_float64(name, family, device, 4, decoupled) < 1e-12


def scales_of(algorithm, options, old, state, grad, pull_terms, new, new_state):
    """The largest term that each result is a sum of: what its rounding is measured in."""
    terms = torch.maximum(grad.double().abs(), pull_terms)
    scales = {}
    for name, value in new_state.items():
        if name != "step":
            share = {"exp_avg": 0.1 * terms, "exp_avg_sq": 1e-3 * terms**2}.get(name, terms)
            scales[name] = torch.maximum(share, torch.maximum(value.abs(), state.get(name, value).double().abs()))
    if algorithm == "sgd":
        update = options["lr"] * scales["momentum_buffer"]
    else:  # what terms of the first moment weigh in the update
        t = new_state["step"]
        spread = (new_state["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8
        update = options["lr"] / (1 - 0.9**t) * scales["exp_avg"] / spread
    scales["weight"] = torch.maximum(torch.maximum(old.double().abs(), new.abs()), update)
    return scales


# In units in the last place of the largest term of a sum: where gradient and penalty cancel, the rounding of each is
# left. bfloat16 is rounded once, from float32. In float32 a chain of roundings is left, torch's own: its fused kernels,
# which the CPU's path calls, come to 2.7 (SGD's buffer) and 3.5 (AdamW's weight) without any penalty.
UNITS = {torch.bfloat16: 0.75, torch.float32: 5.0}
UNITS_WITHOUT_PENALTY = {torch.bfloat16: 0.75, torch.float32: 4.0}


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("family", [None, *STRENGTHS])
@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_single_steps_against_float64(backend, device, algorithm, family, dtype):
    """From every state of a run a step is within a few units in the last place of weight and state."""
    options = OPTIONS[algorithm]
    model = net(dtype, device)
    params = list(model.parameters())
    reg = REGULARIZERS[family](model) if family else None
    lam = 0.1 * STRENGTHS[family] if family else None
    places = penalised(params)
    optimizer = OURS[algorithm](params, **options, penalty=reg, lam=lam)
    worst = {}
    for number in range(300 if backend == "torch" or device.type == "cuda" else 3):
        backward(model, optimizer, number)
        before = [p.detach().cpu().clone() for p in params]
        states = [{k: v.detach().cpu().clone() for k, v in optimizer.state[p].items()} for p in params]
        grads = [p.grad.cpu() for p in params]
        pulls, pull_terms = {}, {}
        if family:
            _, found = penalty_and_grads(family, [before[i] for i in places], reg.eps, reg.r)
            for i, g in zip(places, found, strict=True):
                pulls[i] = lam * g
                a = magnitudes(before[i], reg.r)
                m, v, n = a.mean(), a.var(unbiased=False), torch.tensor(float(a.numel()), dtype=torch.float64)
                _, by_mean, by_var = reg.derivatives(m, v, n, float(sum(before[j].numel() for j in places)))
                pull_terms[i] = lam * (by_mean.abs() / n + 2 * by_var.abs() / n * (a + m))
        optimizer.step()
        for i, (p, old, state, grad) in enumerate(zip(params, before, states, grads, strict=True)):
            new, new_state = STEPS[algorithm](old, grad.double() + pulls.get(i, 0.0), state, **options)
            scales = scales_of(algorithm, options, old, state, grad, pull_terms.get(i, torch.zeros(())), new, new_state)
            for name, scale in scales.items():
                got, want = (p, new) if name == "weight" else (optimizer.state[p][name], new_state[name])
                off = (got.detach().cpu().double() - want).abs() / unit(scale, dtype)
                worst[name] = max(worst.get(name, 0.0), off.max().item())
    print(algorithm, family, dtype, {name: round(units, 2) for name, units in worst.items()})  # shown by -rP
    assert max(worst.values()) <= (UNITS if family else UNITS_WITHOUT_PENALTY)[dtype], worst


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in OPTIONS]
    + [(name, torch.bfloat16) for name in OPTIONS if name.startswith("adamw")],
)
def test_without_penalty_equals_torch(backend, device, name, dtype):
    """A run against torch's fused kernels (bfloat16: but for SGD's, which are wrong on the CPU in torch 2.13)."""
    algorithm, options = name.split()[0], OPTIONS[name]
    results = []
    for kind, extra in ((OURS[algorithm], {}), (TORCHS[algorithm], {"fused": True})):
        model = net(dtype, device)
        results.append(train(model, kind(model.parameters(), **options, **extra), 4))
    assert error(*results) < (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_runs_repeat_bit_for_bit(backend, device, algorithm):
    runs = []
    for _ in range(2):
        model = net(torch.float32, device)
        runs.append(train(model, OURS[algorithm](model.parameters(), **OPTIONS[algorithm], penalty="wcr"), 3))
    assert equal(*runs)


CASES = [
    ("sgd", torch.float32, {}),
    ("adamw", torch.float32, {}),
    ("adamw", torch.bfloat16, {}),
    ("adamw", torch.bfloat16, {"state_dtype": torch.float32}),
    ("sgd", torch.bfloat16, {"state_dtype": torch.float32, "stochastic_rounding": True}),
    ("adamw", torch.bfloat16, {"state_dtype": torch.float32, "master": "float32"}),
    ("sgd", torch.bfloat16, {"state_dtype": torch.float32, "master": "remainder"}),
    ("sgd", torch.float16, {"master": "float32"}),
    ("adamw", torch.float32, {"state_dtype": torch.bfloat16, "amsgrad": True}),
]


@pytest.mark.parametrize(("algorithm", "dtype", "extra"), CASES)
def test_save_load_continue_is_bit_identical(backend, device, tmp_path, algorithm, dtype, extra):
    def make():
        model = net(dtype, device)
        return model, OURS[algorithm](model.parameters(), **OPTIONS[algorithm], penalty="wcr", lam=1e-6, **extra)

    model, optimizer = make()
    train(model, optimizer, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    wanted = train(model, optimizer, 2, start=2)
    torch.manual_seed(99)
    model, optimizer = make()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert equal(train(model, optimizer, 2, start=2), wanted)


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_state_dicts_go_both_ways_with_torch(backend, device, algorithm):
    options = OPTIONS[algorithm]
    model = net(torch.float64, device)
    theirs = TORCHS[algorithm](model.parameters(), **options)
    train(model, theirs, 2)
    twin = copy.deepcopy(model)
    ours = OURS[algorithm](twin.parameters(), **options)
    ours.load_state_dict(theirs.state_dict())
    assert error(train(model, theirs, 2, start=2), train(twin, ours, 2, start=2)) < 1e-14
    third = copy.deepcopy(twin)
    back = TORCHS[algorithm](third.parameters(), **options)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch shares what it loads
    assert error(train(twin, ours, 2, start=4), train(third, back, 2, start=4)) < 1e-14


def test_loading_keeps_dtypes_and_copies():
    model = net(torch.bfloat16)
    ours = AdamW(model.parameters(), state_dtype=torch.float32, master="remainder")
    train(model, ours, 2)
    saved = ours.state_dict()
    twin = AdamW(copy.deepcopy(model).parameters(), state_dtype=torch.float32, master="remainder")
    twin.load_state_dict(saved)
    for mine, loaded in zip(ours.state.values(), twin.state.values(), strict=True):
        assert loaded["exp_avg"].dtype == torch.float32
        assert loaded["remainder"].dtype == torch.int16
        for name, value in mine.items():
            assert torch.equal(loaded[name], value)
            assert loaded[name].data_ptr() != value.data_ptr()
            assert loaded[name].stride() == value.stride()


def test_master_weights_adopt_what_others_write(backend, device):
    for master in ("float32", "remainder"):
        p = nn.Parameter(torch.full((40,), 1.0, dtype=torch.bfloat16, device=device))
        optimizer = SGD([p], lr=2**-12, master=master)
        for _ in range(3):  # each step is below half a unit of bfloat16: only the master copy can hold it
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert torch.equal(p.detach(), torch.ones_like(p))
        with torch.no_grad():
            p[:20] = 0.0
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert (p[:20] == 0).all()
        for _ in range(6):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert (p[20:] < 1).all()


@pytest.mark.parametrize("master", ["float32", "remainder"])
def test_master_weights_beside_weights_without(backend, device, master):
    params = [nn.Parameter(torch.ones(5, dtype=dtype, device=device)) for dtype in (torch.bfloat16, torch.float32)]
    optimizer = AdamW(params, lr=0.1, master=master)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(params[0].float(), params[1], atol=2**-8)


def test_remainders_hold_a_float32_weight_exactly(backend, device):
    weights = [torch.randn(5000, device=device) * 10.0 ** torch.randint(-30, 30, (5000,), device=device)]
    grads = [torch.randn(5000, device=device) * weights[0] for _ in range(4)]
    full = nn.Parameter(weights[0].bfloat16().float())
    half = nn.Parameter(weights[0].bfloat16())
    ours = [SGD([full], lr=1e-3), SGD([half], lr=1e-3, master="remainder")]
    for grad in grads:
        grad = grad.bfloat16()
        full.grad, half.grad = grad.float(), grad
        for optimizer in ours:
            optimizer.step()
    high = half.detach().view(torch.int16).to(torch.int32) << 16
    rebuilt = (high + ours[1].state[half]["remainder"].to(torch.int32)).view(torch.float32)
    assert torch.equal(rebuilt, full.detach())


def test_stochastic_rounding_is_right_in_the_mean(backend, device):
    p = nn.Parameter(torch.ones(40_000, dtype=torch.bfloat16, device=device))
    optimizer = SGD([p], lr=1.0, stochastic_rounding=True)
    p.grad = torch.full_like(p, 2**-10)  # an eighth of a unit below 1, where units are 2^-8
    optimizer.step()
    values = p.detach().float().unique().tolist()
    assert values == [1.0 - 2**-8, 1.0]
    down = (p.detach() < 1).float().mean().item()
    assert abs(down - 0.25) < 4 * (0.25 * 0.75 / 40_000) ** 0.5


@needs_triton
def test_stochastic_rounding_is_the_same_on_both_paths():
    runs = []
    for path in ("torch", "triton"):
        with wcr_fast.backend(path):
            torch.manual_seed(5)
            p = nn.Parameter(torch.randn(40_000).bfloat16().to(DEVICE if path == "triton" else "cpu"))
            optimizer = SGD([p], lr=1e-3, stochastic_rounding=True)
            for number in range(2):
                p.grad = torch.randn(40_000, generator=torch.Generator().manual_seed(number)).to(p)
                optimizer.step()
            runs.append(p.detach().cpu())
    assert torch.equal(*runs)


# --- writes from outside ------------------------------------------------------------------------------------------


def steps_like_fresh(device, disturb):
    """Disturb the weights between two steps; return ours and a fresh optimizer's result from the same state."""
    model = net(torch.float64, device)
    optimizer = SGD(model.parameters(), **OPTIONS["sgd"], penalty=wcr_fast.WCR(model), lam=1e-5)
    train(model, optimizer, 2)
    disturb(model, optimizer)
    twin = copy.deepcopy(model)
    fresh = SGD(twin.parameters(), **OPTIONS["sgd"], penalty=wcr_fast.WCR(twin), lam=1e-5)
    fresh.load_state_dict(optimizer.state_dict())
    return train(model, optimizer, 2, start=2), train(twin, fresh, 2, start=2)


def in_place(model, optimizer):
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def loaded_state(model, optimizer):
    model.load_state_dict({k: v * 1.25 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def swapped_data(model, optimizer):
    model[4].weight.data = model[4].weight.data * 1.5


def pruned(model, optimizer):
    wcr_fast.prune_(model, 0.5)


def announced_numpy_write(model, optimizer):
    model[0].weight.data.copy_(model[0].weight.data * 1.5)
    optimizer.weights_changed()


@pytest.mark.parametrize("disturb", [in_place, loaded_state, swapped_data, pruned, announced_numpy_write])
@pytest.mark.usefixtures("look")
def test_outside_writes_are_exact(backend, device, disturb):
    assert equal(*steps_like_fresh(device, disturb))


def data_write(model, optimizer):
    model[0].weight.data.mul_(1.5)


def one_element(model, optimizer):
    model[4].weight.data[0, 0] += 0.01


def other_fused_optimizer(model, optimizer):
    other = torch.optim.SGD([model[4].weight], lr=0.1, fused=True)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    other.step()


@pytest.mark.parametrize("disturb", [data_write, one_element, other_fused_optimizer])
@pytest.mark.usefixtures("look")
def test_writes_without_a_trace_are_noticed(backend, device, disturb):
    if backend == "torch":  # takes the moments at every step
        assert equal(*steps_like_fresh(device, disturb))
        return
    model = net(torch.float32, device)
    optimizer = SGD(model.parameters(), **OPTIONS["sgd"], penalty=wcr_fast.WCR(model), lam=1e-5)
    train(model, optimizer, 3)
    disturb(model, optimizer)
    backward(model, optimizer, 3)
    optimizer.step()
    backward(model, optimizer, 4)
    with pytest.warns(
        UserWarning, match=r"0\.weight was written" if disturb is data_write else r"4\.weight was written"
    ):
        optimizer.step()
    train(model, optimizer, 2, start=5)  # and no further warning


@pytest.mark.usefixtures("look")
def test_a_replaced_parameter_is_an_error(backend, device):
    model = net(torch.float32, device)
    optimizer = SGD(model.parameters(), lr=0.1, penalty=wcr_fast.WCR(model))
    train(model, optimizer, 1)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    backward(model, optimizer, 1)
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced .* build it anew"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.step()


# --- groups, gradients, layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
def test_groups_have_their_own_numbers(backend, device, as_tensor):
    def number(value):
        return torch.tensor(value, dtype=torch.float64, device=device) if as_tensor else value

    model = net(torch.float64, device)
    params = list(model.parameters())
    reg = wcr_fast.L1(model)
    groups = [
        {"params": params[:1], "lr": number(0.1), "lam": number(1e-3)},
        {"params": params[1:], "weight_decay": number(0.01), "momentum": 0.5, "nesterov": True},
    ]
    reg.lam = 1e-4
    optimizer = SGD(groups, lr=0.05, momentum=0.9, penalty=reg)
    trainers = [
        Trainer("sgd", params[:1], {"lr": 0.1, "momentum": 0.9}, ("l1", 1e-3, 0, 0, penalised(params[:1]))),
        Trainer(
            "sgd",
            params[1:],
            {"lr": 0.05, "momentum": 0.5, "nesterov": True, "weight_decay": 0.01},
            ("l1", 1e-4, 0, 0, penalised(params[1:])),
        ),
    ]
    for i in range(4):
        backward(model, optimizer, i)
        trainers[0].step([p.grad for p in params[:1]])
        trainers[1].step([p.grad for p in params[1:]])
        optimizer.step()
        if i == 1:  # a scheduler's work
            for group, trainer in zip(optimizer.param_groups, trainers, strict=True):
                group["lr"] = group["lr"].mul_(0.5) if as_tensor and group is groups[0] else group["lr"] * 0.5
                trainer.options["lr"] *= 0.5
    assert error(params, [*trainers[0].params, *trainers[1].params]) < 1e-13


def test_late_and_missing_gradients(backend, device):
    def run(kind, **extra):
        torch.manual_seed(3)
        params = [nn.Parameter(torch.randn(30, 7, dtype=torch.float64, device=device)) for _ in range(4)]
        optimizer = kind(params, lr=0.01, **extra)
        for number in range(6):
            for i, p in enumerate(params):
                p.grad = None if number < i or number == 4 else torch.full_like(p, 0.1 * (number + i + 1))
            optimizer.step()
        return [p.detach() for p in params], [float(optimizer.state[p]["step"]) for p in params]

    ours, theirs = run(AdamW), run(torch.optim.AdamW)
    assert error(ours[0], theirs[0]) < 1e-14
    assert ours[1] == theirs[1] == [5, 4, 3, 2]


def test_a_penalised_weight_without_a_gradient_feels_the_penalty(backend, device):
    p = nn.Parameter(torch.tensor([[1.0, -2.0]], device=device))
    optimizer = SGD([p], lr=0.5, penalty="l1", lam=0.25)
    optimizer.step()
    assert p.tolist() == [[0.875, -1.875]]
    optimizer.param_groups[0]["lam"] = 0.0
    optimizer.step()
    assert p.tolist() == [[0.875, -1.875]]
    assert p.grad is None


def test_a_strength_of_zero_in_a_tensor_is_a_gradient_of_zero(backend, device):
    """As autograd has it: the weight steps, by its decay; a plain 0 is no penalty at all."""
    p, frozen = (nn.Parameter(torch.ones(3, 3, device=device)) for _ in range(2))
    lam = torch.zeros((), device=device)
    optimizer = SGD(
        [{"params": [p], "lam": lam}, {"params": [frozen]}], lr=0.5, weight_decay=0.5, penalty="l1", lam=0.0
    )
    for _ in range(2):
        optimizer.step()
    assert p.unique().tolist() == [0.5625]
    assert frozen.unique().tolist() == [1.0]


def test_gradients_are_not_kept_alive(backend, device):
    model = net(torch.float32, device)
    optimizer = SGD(model.parameters(), **OPTIONS["sgd"], penalty=wcr_fast.WCR(model), lam=1e-5)
    for number in range(3):
        backward(model, optimizer, number)
        optimizer.step()
        gradients = [weakref.ref(p.grad.untyped_storage()) for p in model.parameters()]
        optimizer.zero_grad()
        gc.collect()
        assert not any(ref() for ref in gradients)


def test_betas_in_tensors_are_read_again(backend, device):
    """A change in place, between steps that only repeat the last one."""
    runs = []
    for kind in (AdamW, torch.optim.AdamW):
        beta, other = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
        p = nn.Parameter(torch.ones(3, 3, dtype=torch.float64, device=device))
        optimizer = kind([p], lr=0.1, betas=(beta, other), foreach=False)
        for number in range(6):
            p.grad = torch.full_like(p, 1.0 + number)
            if number == 3:
                beta.fill_(0.25)
            optimizer.step()
        runs.append(p.detach())
    assert error([runs[0]], [runs[1]]) < 1e-14


def test_sgd_has_torchs_state(backend, device):
    model = net(torch.float32, device)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    assert {name for state in optimizer.state.values() for name in state} == {"momentum_buffer"}


def test_a_state_of_torchs_leaves_each_group_its_strength():
    model = net()
    params = list(model.parameters())
    lam = torch.tensor(0.5)
    groups = [{"params": params[:2], "lam": lam}, {"params": params[2:]}]
    ours = SGD(groups, lr=0.1, momentum=0.9, penalty="l1", lam=0.25, stochastic_rounding=True)
    theirs = torch.optim.SGD([{"params": params[:2], "lr": 0.3}, {"params": params[2:]}], lr=0.1, momentum=0.9)
    train(model, theirs, 1)
    seeds = [group["seed"] for group in ours.param_groups]
    ours.load_state_dict(theirs.state_dict())
    assert [group["lam"] for group in ours.param_groups] == [lam, 0.25]
    assert ours.param_groups[0]["lam"] is lam  # whoever schedules it in place still does
    assert [group["lr"] for group in ours.param_groups] == [0.3, 0.1]
    assert [group["seed"] for group in ours.param_groups] == seeds


def test_a_state_for_other_options():
    """A strength without a penalty is warned about, master weights of another optimizer are left out."""
    params = list(net(torch.bfloat16).parameters())
    theirs = AdamW(params, penalty="l1", lam=0.5, master="float32")
    for p in params:
        p.grad = torch.ones_like(p)
    theirs.step()
    ours = AdamW(params, master="remainder")
    with pytest.warns(UserWarning, match=r"lam=0\.5, but there is no penalty here"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lam"] is None
    assert not any("master" in state for state in ours.state.values())
    ours.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    default = AdamW(params, penalty=wcr_fast.L1(params[:1], lam=0.25))
    named = AdamW(params, penalty="l1", lam=0.125)
    named.load_state_dict(default.state_dict())
    assert named.param_groups[0]["lam"] == 0.125


def test_penalised_parameters_have_their_names():
    optimizer = SGD(net().named_parameters(), lr=0.1, penalty="l1")
    assert list(optimizer.penalty.weights) == ["0.weight", "4.weight"]


@pytest.mark.usefixtures("look")
def test_frozen_weights_are_left_alone(backend, device):
    model = net(torch.float32, device)
    optimizer = SGD(model.parameters(), lr=0.1, penalty=wcr_fast.L1(model), lam=0.1)
    train(model, optimizer, 1)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    train(model, optimizer, 2, start=1)
    assert torch.equal(model[0].weight, before)


def test_gradients_stay_as_they_are(backend, device):
    model = net(torch.float32, device)
    optimizer = SGD(model.parameters(), lr=0.1, penalty=wcr_fast.WCR(model))
    backward(model, optimizer, 0)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert equal([p.grad for p in model.parameters()], before)


def layouts(device):
    """Parameters in memory as users have them: with gaps, transposed, misaligned, tiny, empty, 0-d."""
    storage = torch.randn(70_000, device=device)
    return [
        torch.randn(33, 40, device=device)[:, ::2],
        torch.randn(20, 300, device=device).t(),
        storage[1:33_000],
        storage[33_001:33_002],
        torch.randn(4, 5, 6, 7, device=device).to(memory_format=torch.channels_last),
        torch.randn(0, 4, device=device),
        torch.tensor(0.5, device=device),
    ]


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_any_layout_of_weights_and_gradients(backend, device, algorithm):
    torch.manual_seed(4)
    params = [nn.Parameter(t) for t in layouts(device)]
    places = (0, 1, 4)
    optimizer = OURS[algorithm](
        params, **OPTIONS[algorithm], penalty=wcr_fast.L1([params[i] for i in places]), lam=0.01
    )
    trainer = Trainer(algorithm, params, OPTIONS[algorithm], ("l1", 0.01, 0, 0, places))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, device=device)  # contiguous, whatever the weight is
        trainer.step([p.grad for p in params])
        optimizer.step()
    for p, wanted in zip(params, trainer.params, strict=True):
        torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("look")
def test_a_change_of_memory_format_takes_the_state_along(backend, device):
    runs = []
    for change in (False, True):
        model = net(torch.float64, device)
        optimizer = AdamW(model.parameters(), **OPTIONS["adamw"], penalty=wcr_fast.WCR(model), lam=1e-6)
        train(model, optimizer, 2)
        if change:
            model.to(memory_format=torch.contiguous_format)
        runs.append(train(model, optimizer, 2, start=2))
    assert runs[0][0].stride() != runs[1][0].stride()
    assert error(*runs) < 1e-12


def test_replaced_parameters_with_a_penalty_by_name(backend, device):
    model = net(torch.float32, device)
    optimizer = SGD(model.parameters(), lr=0.1, penalty="l1", lam=0.5)
    train(model, optimizer, 1)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.zero_grad()
    before = model[4].weight.detach().clone()
    optimizer.step()
    assert torch.allclose(model[4].weight, before - 0.05 * before.sign())
    for p in model.parameters():
        p.requires_grad_(False)
    optimizer.step()  # nothing to penalise, nothing to step


def test_many_tiny_parameters(backend, device):
    params = [nn.Parameter(torch.randn(1 + i % 3, device=device)) for i in range(60)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = SGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(twins, lr=0.1, momentum=0.9)
    for _ in range(2):
        for p, t in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            t.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert error(params, twins) < 1e-6


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_lists_equal_the_reference(data):
    """Shapes, dtypes and options drawn at random, on both paths."""
    path = data.draw(st.sampled_from(["torch"] if TRITON_SKIP else ["torch", "triton"]))
    name = data.draw(st.sampled_from([n for n in OPTIONS if "nesterov" not in n]))
    family = data.draw(st.sampled_from([None, *STRENGTHS]))
    shapes = data.draw(st.lists(st.tuples(st.integers(2, 9), st.integers(2, 200)), min_size=1, max_size=4))
    algorithm, options = name.split()[0], OPTIONS[name]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    device = DEVICE if path == "triton" else "cpu"
    params = [nn.Parameter(torch.randn(s, dtype=torch.float64).to(device)) for s in shapes]
    reg = REGULARIZERS[family](params) if family else None
    optimizer = OURS[algorithm](params, **options, penalty=reg, lam=STRENGTHS.get(family))
    chosen = (family, STRENGTHS[family], reg.eps, reg.r, range(len(params))) if family else None
    trainer = Trainer(algorithm, [p.cpu() for p in params], options, chosen)
    with wcr_fast.backend(path):
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            trainer.step([p.grad.cpu() for p in params])
            optimizer.step()
    assert error([p.cpu() for p in params], trainer.params) < 1e-12


def test_masks_hold_weight_and_state(backend, device):
    model = net(torch.float32, device)
    optimizer = AdamW(model.parameters(), **OPTIONS["adamw"], penalty=wcr_fast.WCR(model), lam=1e-6)
    weight = model[4].weight
    words = torch.randint(-(2**31), 2**31 - 1, (1024,), dtype=torch.int64, device=device).to(torch.int32)
    optimizer._set_mask(weight, words)
    train(model, optimizer, 3)
    bits = ((words[None] >> torch.arange(32, device=device, dtype=torch.int32)[:, None]) & 1).bool().view(-1)
    gone = ~bits[: weight.numel()].view(weight.shape)
    assert gone.any()
    for t in (weight, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]):
        assert (t[gone] == 0).all()
        assert (t[~gone] != 0).any()
    optimizer._set_mask(weight, None)
    train(model, optimizer, 1, start=3)
    assert (weight[gone] != 0).any()


# --- what surrounds a step ----------------------------------------------------------------------------------------


def test_closure_returns_the_loss_with_the_penalty(backend, device):
    model = net(torch.float32, device)
    reg = wcr_fast.L1(model)
    optimizer = SGD(model.parameters(), lr=0.1, penalty=reg, lam=0.01)
    psi = sum(p.abs().sum() for p in model.parameters() if p.dim() >= 2).item()
    seen = []

    def closure():
        seen.append(backward(model, optimizer, 0).detach())
        return seen[-1]

    assert optimizer.step(closure).item() == pytest.approx(seen[0].item() + 0.01 * psi, rel=1e-5)
    plain = SGD(net().parameters(), lr=0.1)
    assert plain.step(lambda: None) is None


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_grad_scaler(backend, device, algorithm):
    def run(scaled):
        model = net(torch.float32, device)
        optimizer = OURS[algorithm](model.parameters(), **OPTIONS[algorithm], penalty=wcr_fast.WCR(model), lam=1e-5)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=3, enabled=scaled)
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(8, 3, 6, 6, generator=generator).to(device)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            scaler.scale(loss).backward()
            if number == 0 and scaled:  # an overflow: nothing may move, no step be counted
                before = [p.detach().clone() for p in model.parameters()]
                model[4].weight.grad[0, 0] = torch.inf
                scaler.step(optimizer)
                assert equal(before, list(model.parameters()))
            elif number:
                scaler.step(optimizer)
            scaler.update()
        return [p.detach().clone() for p in model.parameters()]

    model_scaled, model_plain = run(True), run(False)
    assert error(model_scaled, model_plain) < 1e-5


def test_unscaled_gradients_may_be_clipped(device):
    model = net(torch.float32, device)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    scaler.scale(model(torch.randn(4, 3, 6, 6, device=device)).square().mean()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    wanted = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    scaler.step(optimizer)
    assert error(model.parameters(), wanted) < 1e-6


def _momentum_on(o):
    o.param_groups[0]["momentum"] = 0.9


def _momentum_off(o):
    o.param_groups[0]["momentum"] = 0


def _state_cleared(o):
    o.state.clear()


def _inner_states_cleared(o):
    for state in o.state.values():
        state.clear()


def _buffers_gone(o):
    for state in o.state.values():
        state["momentum_buffer"] = None


def _moved_between_groups(o):
    o.param_groups[1]["params"].insert(0, o.param_groups[0]["params"].pop())


def _lr_moved(o):
    o.param_groups[0]["lr"] = 0.3


def _dampening_off(o):
    o.param_groups[0]["dampening"] = 0.0


def _dampening_on(o):
    o.param_groups[1]["dampening"] = 0.5  # it was 0: no step was counted so far


@pytest.mark.parametrize(
    ("change", "momentum"),
    [
        (_momentum_on, 0.0),
        (_momentum_off, 0.9),
        (_state_cleared, 0.9),
        (_inner_states_cleared, 0.9),
        (_buffers_gone, 0.9),
        (_moved_between_groups, 0.9),
        (_lr_moved, 0.9),
        (_dampening_off, 0.9),
        (_dampening_on, 0.9),
    ],
)
@pytest.mark.usefixtures("look")
def test_changes_between_steps_count(backend, device, change, momentum):
    """After two steps, the second of them a repeated one, whatever torch's own optimizer would notice."""
    runs = []
    for kind in (SGD, torch.optim.SGD):
        torch.manual_seed(3)
        params = [nn.Parameter(torch.randn(4, 5, dtype=torch.float64, device=device)) for _ in range(3)]
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.02, "dampening": 0.0}]
        optimizer = kind(groups, momentum=momentum, dampening=0.25)
        for number in range(6):
            for p in params:
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(number)).to(device)
            if number == 3:
                change(optimizer)
            optimizer.step()
        runs.append([p.detach() for p in params])
    assert error(*runs) < 1e-14


def _state_of_its_own(o):
    for p, state in list(o.state.items()):
        o.state[p] = {name: 0.5 * t if name == "momentum_buffer" else t for name, t in state.items()}


def _state_moved(o):
    for state in o.state.values():
        old = state["momentum_buffer"].data
        state["momentum_buffer"].data = old.clone()
        old.fill_(99.0)


@pytest.mark.parametrize("change", [_state_of_its_own, _state_moved])
@pytest.mark.usefixtures("look")
def test_states_changed_between_steps_count(backend, device, change):
    """As above, while the groups stay the same."""
    runs = []
    for kind in (SGD, torch.optim.SGD):
        torch.manual_seed(3)
        p = nn.Parameter(torch.randn(4, 5, dtype=torch.float64, device=device))
        optimizer = kind([p], lr=0.1, momentum=0.9)
        for number in range(6):
            p.grad = torch.full_like(p, 1.0 + number)
            if number == 3:
                change(optimizer)
            optimizer.step()
        runs.append(p.detach())
    assert error([runs[0]], [runs[1]]) < 1e-14


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
@pytest.mark.usefixtures("look")
def test_closures_between_other_steps(backend, device, algorithm, missing):
    """A step with a closure sees other gradients (one of none, or of another layout) than those around it."""
    runs = []
    for kind in (OURS[algorithm], TORCHS[algorithm]):
        params = [nn.Parameter(torch.ones(3, 4, dtype=torch.float64, device=device)) for _ in range(2)]
        optimizer = kind(params, lr=0.1)

        def gradients(number, params=params):
            for i, p in enumerate(params):
                grad = torch.arange(12.0, dtype=p.dtype, device=device).view(4, 3).t() + number
                p.grad = grad if number != 2 else None if missing and i else grad.contiguous()
            return torch.ones(())

        for number in range(5):
            if number == 2:
                optimizer.step(lambda: gradients(2))
            else:
                gradients(number)
                optimizer.step()
        runs.append([p.detach() for p in params])
    assert error(*runs) < 1e-14


@pytest.mark.usefixtures("look")
def test_constants_changed_between_steps_count(backend, device):
    runs = []
    for changed in (False, True):
        torch.manual_seed(3)
        p = nn.Parameter(torch.randn(4, 5, dtype=torch.float64, device=device))
        reg = wcr_fast.WCR([p], eps=1e-8)
        optimizer = SGD([p], lr=0.1, penalty=reg, lam=1e-3)
        for number in range(5):
            p.grad = torch.zeros_like(p)
            if number >= 3 and changed:
                reg.eps = 0.01
            elif number >= 3:
                reg = wcr_fast.WCR([p], eps=0.01)
                optimizer = SGD([p], lr=0.1, penalty=reg, lam=1e-3)
            optimizer.step()
        runs.append(p.detach())
    assert error([runs[0]], [runs[1]]) < 1e-14


@pytest.mark.usefixtures("look")
def test_a_module_whose_weight_was_replaced_is_noticed(backend, device):
    """While the old parameter lives on, with its gradient, at its place."""
    model = net(torch.float32, device)
    optimizer = SGD(model.parameters(), lr=0.1, penalty=wcr_fast.WCR(model))
    train(model, optimizer, 3)
    model[0].weight = nn.Parameter(model[0].weight.detach())
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced"):
        optimizer.step()


@pytest.mark.usefixtures("look")
def test_scaled_steps_among_others(backend, device):
    """As a gradient scaler hands its tensors over: for one step."""
    runs = []
    for scaled in (False, True):
        p = nn.Parameter(torch.ones(3, 4, device=device))
        optimizer = SGD([p], lr=0.5, momentum=0.5)
        for number in range(8):
            scale = 4.0 if scaled and number in (3, 4, 6) else 1.0
            p.grad = torch.full_like(p, scale * (1.0 + number))
            if scale != 1.0:
                optimizer.grad_scale = torch.full((), scale, device=device)
                optimizer.found_inf = torch.zeros((), device=device)
            optimizer.step()
            if scale != 1.0:
                del optimizer.grad_scale, optimizer.found_inf
        runs.append(p.detach())
    assert torch.equal(*runs)


def test_dampening_begins_for_each_parameter_by_itself(backend, device):
    runs = []
    for kind in (SGD, torch.optim.SGD):
        params = [nn.Parameter(torch.ones(3, dtype=torch.float64, device=device)) for _ in range(2)]
        optimizer = kind(params, lr=0.1, momentum=0.9, dampening=0.5)
        for number in range(4):
            for i, p in enumerate(params):
                p.grad = None if i > number else torch.full_like(p, 1.0 + number)
            optimizer.step()
        runs.append([p.detach() for p in params])
    assert error(*runs) < 1e-14


@pytest.mark.usefixtures("look")
def test_a_weight_with_gaps_that_others_write(backend, device):
    runs = []
    for kind in (SGD, torch.optim.SGD):
        base = torch.ones(6, 8, dtype=torch.float64, device=device)
        p = nn.Parameter(base[:, ::2])
        optimizer = kind([p], lr=0.1, momentum=0.9)
        for number in range(5):
            p.grad = torch.full(p.shape, 1.0 + number, dtype=p.dtype, device=device)
            if number >= 2:
                base.mul_(0.5)
                optimizer.state[p]["momentum_buffer"].mul_(0.25)
            optimizer.step()
        runs.append(p.detach().clone())
    assert error([runs[0]], [runs[1]]) < 1e-14


def test_nothing_is_kept_alive_by_a_cycle(backend, device):
    """Weights and states go when the last one forgets them, not when the collector comes by."""
    gc.collect()
    gc.disable()
    try:
        params = [nn.Parameter(torch.randn(5, 6, device=device)) for _ in range(2)]
        optimizer = AdamW(params, penalty="l1", lam=1e-3)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        arrays = [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
        optimizer.load_state_dict(optimizer.state_dict())
        assert not any(ref() is not None for ref in arrays)
        weights = [weakref.ref(p) for p in params]
        del params, optimizer, p
        assert not any(ref() is not None for ref in weights)
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["group", "regularizer", "tensor"])
@pytest.mark.usefixtures("look")
def test_a_strength_that_rises_from_zero(backend, device, how):
    p = nn.Parameter(torch.tensor([[1.0, -2.0]], device=device))
    reg = wcr_fast.L1([p], lam=0.0)
    lam = torch.zeros((), device=device) if how == "tensor" else None
    optimizer = SGD([p], lr=1.0, penalty=reg, lam=lam)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p.tolist() == [[1.0, -2.0]]
    if how == "group":
        optimizer.param_groups[0]["lam"] = 0.25
    elif how == "regularizer":
        reg.lam = 0.25
    else:
        lam.fill_(0.25)
    optimizer.step()
    assert p.tolist() == [[0.75, -1.75]]
    p.requires_grad_(False)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.tolist() == [[0.75, -1.75]]
    p.requires_grad_()
    optimizer.step()
    assert p.tolist() == [[0.5, -1.5]]


@pytest.mark.usefixtures("look")
def test_gradients_of_another_dtype(backend, device):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("torch before 2.10 has no grad_dtype")
    p = nn.Parameter(torch.ones(3, 3, device=device))
    p.grad_dtype = None
    optimizer = SGD([p], lr=0.25)
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32):
        p.grad = torch.ones(3, 3, dtype=dtype, device=device)
        optimizer.step()
    assert p.unique().tolist() == [-0.5]


def test_deepcopy_and_pickle(backend, device):
    model = net(torch.float32, device)
    optimizer = SGD(model.parameters(), **OPTIONS["sgd"], penalty=wcr_fast.WCR(model), lam=1e-5)
    train(model, optimizer, 2)
    twin, other = copy.deepcopy((model, optimizer))
    third, another = pickle.loads(pickle.dumps((model, optimizer)))
    wanted = train(model, optimizer, 2, start=2)
    assert equal(train(twin, other, 2, start=2), wanted)
    assert equal(train(third, another, 2, start=2), wanted)


def test_hooks_and_schedulers(backend, device):
    model = net(torch.float32, device)
    optimizer = AdamW(model.parameters(), lr=0.01, penalty="wcr")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for number in range(3):
        backward(model, optimizer, number)
        optimizer.step()
        scheduler.step()
    assert calls == ["pre", "post"] * 3
    assert optimizer.param_groups[0]["lr"] < 0.01
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("algorithm", OURS)
def test_every_number_may_change_at_every_step(backend, device, algorithm):
    """Without a penalty, a mask or a count, too, where all parameters go to torch in one call."""
    runs = []
    for kind in (OURS[algorithm], TORCHS[algorithm]):
        model = net(torch.float64, device)
        params = list(model.parameters())
        options = {"momentum": 0.9} if algorithm == "sgd" else {}
        optimizer = kind([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], lr=0.01, **options)
        for number in range(5):
            for place, group in enumerate(optimizer.param_groups):
                group["lr"] *= 0.7 + place
                group["weight_decay"] = 0.01 * number
                group["momentum" if algorithm == "sgd" else "eps"] = 0.5 / (number + place + 1)
            backward(model, optimizer, number)
            optimizer.step()
        runs.append([p.detach() for p in params])
    assert error(*runs) < 1e-13


@pytest.mark.usefixtures("look")
def test_a_backward_across_a_step_raises(backend, device):
    p = nn.Parameter(torch.randn(4, 4, device=device))
    optimizer = SGD([p], lr=0.1)
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_added_groups_are_penalised_too(backend, device):
    first, second = (nn.Parameter(torch.ones(2, 2, device=device)) for _ in range(2))
    optimizer = SGD([first], lr=1.0, penalty="l1", lam=0.25)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "lam": 0.5})
    optimizer.step()
    assert first.unique().tolist() == [0.5]
    assert second.unique().tolist() == [0.5]


def test_user_formula(backend, device):
    class Spread(wcr_fast.Regularizer):
        def formula(self, mean, var, numel, total):
            return -var

    p = nn.Parameter(torch.randn(30, 40, dtype=torch.float64, device=device))
    twin = p.detach().clone().requires_grad_()
    optimizer = SGD([p], lr=0.1, penalty=Spread, lam=2.0)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        (grad,) = torch.autograd.grad(-2.0 * twin.abs().var(unbiased=False), twin)
        twin = (twin - 0.1 * grad).detach().requires_grad_()
    torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-12, atol=1e-14)


def test_repr_and_state_hold_plain_values(tmp_path):
    model = net()
    optimizer = AdamW(model.parameters(), penalty=wcr_fast.WCR(model), lam=1e-6)
    train(model, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    assert loaded["param_groups"][0]["lam"] == 1e-6
    assert "lam: 1e-06" in repr(optimizer)


# --- errors ----------------------------------------------------------------------------------------------------


def linear():
    return nn.Linear(3, 4)


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (ValueError, "differentiable", lambda: SGD(linear().parameters(), differentiable=True)),
        (ValueError, "Nesterov", lambda: SGD(linear().parameters(), nesterov=True)),
        (ValueError, "Invalid learning rate", lambda: AdamW(linear().parameters(), lr=-1.0)),
        (RuntimeError, "cannot be `True` together", lambda: SGD(linear().parameters(), foreach=True, fused=True)),
        (ValueError, "no penalty is called 'wrc'; there are wcr", lambda: SGD(linear().parameters(), penalty="wrc")),
        (TypeError, "penalty must be a regularizer", lambda: SGD(linear().parameters(), penalty=3)),
        (ValueError, "need a penalty", lambda: SGD(linear().parameters(), lam=0.1)),
        (ValueError, "need a penalty", lambda: AdamW(linear().parameters(), decoupled=True)),
        (ValueError, "no penalty", lambda: SGD([{"params": linear().parameters(), "lam": 0.1}], lr=0.1)),
        (ValueError, "lam must be finite", lambda: SGD(linear().parameters(), penalty="l1", lam=float("nan"))),
        (ValueError, "exclude needs names", lambda: SGD(linear().parameters(), penalty="l1", exclude="weight")),
        (ValueError, "exclude goes with", lambda: SGD(linear().named_parameters(), exclude="weight")),
        (ValueError, "none has two or more", lambda: SGD([linear().bias], penalty="l1")),
        (ValueError, "leaves none", lambda: SGD(linear().named_parameters(), penalty="l1", exclude="*")),
        (ValueError, "knows no modules", lambda: SGD(linear().named_parameters(), penalty="l1", exclude=nn.Linear)),
        (TypeError, "lam must be a number", lambda: SGD(linear().parameters(), penalty="l1", lam="a")),
        (TypeError, "for bfloat16", lambda: SGD(linear().half().parameters(), stochastic_rounding=True)),
        (ValueError, "owns none", lambda: SGD(linear().parameters(), penalty=wcr_fast.L1(linear()))),
        (ValueError, "master must be", lambda: SGD(linear().parameters(), master="fp32")),
        (ValueError, "state_dtype must be", lambda: SGD(linear().parameters(), state_dtype=torch.int8)),
        (TypeError, "float64 weights keep", lambda: SGD(linear().double().parameters(), state_dtype=torch.float32)),
        (TypeError, "bfloat16 weight", lambda: SGD(linear().half().parameters(), master="remainder")),
        (ValueError, "drop stochastic", lambda: SGD(linear().parameters(), master="float32", stochastic_rounding=True)),
        (ValueError, "all magnitudes", lambda: SGD([nn.Parameter(torch.zeros(3, 3))], penalty="wcr")),
        (ValueError, "empty parameter list", lambda: SGD([])),
    ],
)
def test_bad_arguments(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_excluded_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = SGD(model.named_parameters(), lr=1.0, penalty="l1", lam=0.5, exclude="0.*")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert changed == [False, False, True, False]


def test_sparse_gradients_are_refused(backend, device):
    table = nn.Embedding(5, 3, sparse=True).to(device)
    optimizer = SGD(table.parameters(), lr=0.1)
    table(torch.tensor([1], device=device)).sum().backward()
    with pytest.raises(TypeError, match=r"parameter 0 of shape \(5, 3\) has a sparse gradient"):
        optimizer.step()


def test_expanded_weights_are_refused(backend, device):
    p = torch.ones(3, 1, device=device).expand(3, 4).requires_grad_()
    p.grad = torch.ones(3, 4, device=device)
    optimizer = SGD([p], lr=0.1)
    with pytest.raises(ValueError, match="expanded"):
        optimizer.step()


def test_attach_refuses_an_optimizer_with_a_penalty():
    model = net()
    reg = wcr_fast.WCR(model)
    optimizer = SGD(model.parameters(), lr=0.1, penalty=reg)
    with pytest.raises(ValueError, match="has a penalty of its own"):
        reg.attach(optimizer)
