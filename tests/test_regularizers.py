"""The moments family: values, both gradient paths, choice of weights, refusals."""

import copy
import pickle

import pytest
import reference
import torch
from torch import nn

import wcr_fast
from wcr_fast.weights import choose

MEMBERS = {
    "wcr": wcr_fast.WCR,
    "l1": wcr_fast.L1,
    "l2": wcr_fast.L2,
    "hoyer_square": wcr_fast.HoyerSquare,
    "relative": wcr_fast.RelativeConcentration,
    "log": wcr_fast.LogConcentration,
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm([4, 6])
        self.fc = nn.Linear(6, 11)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def net(device):
    return Net().to(device)


@pytest.mark.parametrize("family", MEMBERS)
@pytest.mark.parametrize("r", [None, 1e-8, 1e-3])
def test_value_and_gradient_match_the_formula(backend, net, family, r):
    reg = MEMBERS[family](net, lam=0.5, r=r)
    params = list(reg.weights.values())
    psi, want = reference.penalty_and_grads(family, params, reg.eps, reg.r)
    value = reg()
    assert value.dim() == 0
    assert value.item() == pytest.approx(0.5 * psi.item(), rel=1e-5)
    value.backward()
    through_loss = [p.grad.clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    reg.add_grad_()
    for p, g, w in zip(params, through_loss, want, strict=True):
        assert reference.relative_error(g, 0.5 * w) < 5e-6
        assert reference.relative_error(p.grad, 1 + 0.5 * w) < 5e-6


@pytest.mark.parametrize("family", MEMBERS)
def test_add_grad_creates_missing_gradients(backend, net, family):
    reg = MEMBERS[family](net)
    net.zero_grad(set_to_none=True)
    reg.add_grad_()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in reg.weights.values())
    assert net.fc.bias.grad is None


@pytest.mark.parametrize("family", MEMBERS)
def test_derivatives_by_hand_equal_autograd(family):
    reg = MEMBERS[family]([torch.randn(5, 7), torch.randn(40, 2)])
    mean, var = torch.rand(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    numel = torch.tensor([35.0, 80.0], dtype=torch.float64)
    by_hand = reg.derivatives(mean, var, numel, 115.0)
    by_autograd = wcr_fast.Regularizer.derivatives(reg, mean, var, numel, 115.0)
    for a, b in zip(by_hand, by_autograd, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", MEMBERS)
def test_nan_shows_in_the_value(backend, device, family):
    w = torch.randn(4, 4, device=device)
    reg = MEMBERS[family]([w])
    w[1, 1] = float("nan")
    assert reg().isnan()


@pytest.mark.parametrize("family", ["l1", "hoyer_square"])
def test_zero_tensors_are_finite(backend, device, family):
    w = torch.zeros(3, 4, device=device).requires_grad_()
    reg = MEMBERS[family]([w])
    assert reg().item() == 0.0
    reg.add_grad_()
    assert torch.count_nonzero(w.grad) == 0


@pytest.mark.parametrize("family", ["hoyer_square", "relative", "log"])
def test_scale_free(backend, device, family):
    w = torch.randn(50, 20).to(device)
    a = MEMBERS[family]([w], lam=1.0, eps=0.0)().item()
    b = MEMBERS[family]([w * 0.01], lam=1.0, eps=0.0)().item()
    assert a == pytest.approx(b, rel=1e-5)


def test_a_user_writes_one_in_a_few_lines(backend, device):
    class Spread(wcr_fast.Regularizer):
        def formula(self, mean, var, numel, total):
            return numel * var.sqrt()

    w = torch.randn(20, 30).to(device).requires_grad_()
    reg = Spread([w], lam=2.0)
    reg().backward()
    through_loss, w.grad = w.grad, None
    reg.add_grad_()
    x = w.detach().double().requires_grad_()
    (2.0 * x.numel() * x.abs().std(unbiased=False)).backward()
    assert reference.relative_error(w.grad, x.grad) < 5e-6
    assert reference.relative_error(through_loss, x.grad) < 5e-6


def test_a_member_with_another_formula_forgets_the_old_one(backend, device):
    class Var(wcr_fast.WCR):
        def formula(self, mean, var, numel, total):
            return var

    w = torch.randn(8, 8).to(device).requires_grad_()
    reg = Var([w], lam=1.0)
    reg().backward()
    through_loss, w.grad = w.grad, None
    reg.add_grad_()
    assert reference.relative_error(w.grad, through_loss.double()) < 5e-6


def test_the_same_weights_twice_are_refused():
    w = torch.randn(4, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"weights\[0\] and weights\[1\] are the same"):
        wcr_fast.WCR([w, w])


def test_a_replacement_of_another_size_or_kind_is_refused(net):
    wcr = wcr_fast.WCR(net)
    net.fc.weight = nn.Parameter(torch.randn(3, 3))
    with pytest.raises(RuntimeError, match=r"fc\.weight was replaced"):
        wcr()
    net.fc.weight = nn.Parameter(torch.eye(11, 6).to_sparse())
    with pytest.raises(TypeError, match="layout"):
        wcr.add_grad_()


def test_types_exclude_what_lies_inside():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    assert list(wcr_fast.WCR(model, exclude=nn.MultiheadAttention).weights) == ["fc.weight"]


def test_norms_are_known_by_class_and_by_the_end_of_their_name():
    class NormalizedLinear(nn.Linear):
        pass

    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 8))

    model = nn.ModuleDict({"a": NormalizedLinear(8, 8), "b": LlamaRMSNorm()})
    assert list(wcr_fast.WCR(model).weights) == ["a.weight"]


def test_a_module_under_two_names_is_matched_by_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    assert "a.weight = b.weight" in repr(wcr_fast.WCR(model))
    assert list(wcr_fast.WCR(model, exclude="b").weights) == ["c.weight"]


def test_pickles_also_when_attached(net):
    wcr = wcr_fast.WCR([p for p in net.parameters() if p.dim() == 4])
    wcr.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    assert pickle.loads(pickle.dumps(wcr))().item() == pytest.approx(wcr().item())


def test_a_formula_is_needed():
    with pytest.raises(TypeError, match="must define formula"):
        wcr_fast.Regularizer([torch.randn(3, 3)])()


def test_the_choice_of_weights(net):
    wcr = wcr_fast.WCR(net)
    assert list(wcr.weights) == ["embed.weight", "conv.weight", "fc.weight"]
    shown = repr(wcr)
    assert "embed.weight = head.weight" in shown
    assert "left out: bn.weight (1-d)" in shown
    assert "left out: norm.weight (normalisation (LayerNorm))" in shown
    assert list(wcr_fast.WCR(net, exclude=nn.Embedding).weights) == ["conv.weight", "fc.weight"]
    assert list(wcr_fast.WCR(net, exclude="head.*").weights) == ["conv.weight", "fc.weight"]
    assert list(wcr_fast.WCR(net, exclude=["conv", "re:f.\\.weight"]).weights) == ["embed.weight"]
    assert list(wcr_fast.WCR(net, exclude=lambda name, p: p.dim() == 4).weights) == ["embed.weight", "fc.weight"]
    assert list(wcr_fast.WCR(net, exclude=nn.Conv3d).weights) == list(wcr.weights)  # a type may match nothing
    net.conv.weight.requires_grad_(False)
    assert "conv.weight" not in wcr_fast.WCR(net).weights
    assert "conv.weight" in [w.name for w in choose(net).weights]  # pruning doesn't ask for requires_grad


def test_wrong_choices_are_named(net):
    with pytest.raises(ValueError, match=r"'nothing\.\*' matches no parameter"):
        wcr_fast.WCR(net, exclude="nothing.*")
    with pytest.raises(ValueError, match="not a regular expression"):
        wcr_fast.WCR(net, exclude="re:(")
    with pytest.raises(ValueError, match="no weight to penalise"):
        wcr_fast.WCR(nn.LayerNorm(5))
    with pytest.raises(TypeError, match="exclude takes"):
        wcr_fast.WCR(net, exclude=[3])
    with pytest.raises(TypeError, match="exclude takes"):
        wcr_fast.WCR(net, exclude=None)
    with pytest.raises(TypeError, match="weights must be"):
        wcr_fast.WCR(None)
    with pytest.raises(ValueError, match="exclude needs a module"):
        wcr_fast.WCR(list(net.parameters())[:1], exclude="a")
    with pytest.raises(ValueError, match="lam must be finite"):
        wcr_fast.WCR(net, lam=float("nan"))
    with pytest.raises(ValueError, match="0-d"):
        wcr_fast.WCR(net, lam=torch.ones(2))


def test_lazy_and_placeholder_parameters_are_refused():
    with pytest.raises(ValueError, match="not initialised"):
        wcr_fast.WCR(nn.LazyLinear(3))
    model = nn.Linear(3, 3)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3"):
        wcr_fast.WCR(model)


def test_constant_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(ValueError, match=r"1\.weight.*exclude"):
        wcr_fast.WCR(model)
    wcr_fast.WCR(model, exclude="1")
    nn.init.constant_(model[1].weight, 0.5)
    for member in (wcr_fast.WCR, wcr_fast.RelativeConcentration, wcr_fast.LogConcentration):
        with pytest.raises(ValueError, match=r"1\.weight"):
            member(model)


def test_lam_may_change_and_may_be_a_tensor(net):
    wcr = wcr_fast.WCR(net, lam=1.0)
    psi = wcr().item()
    wcr.lam = 2.0
    assert wcr().item() == pytest.approx(2 * psi)
    wcr.lam = torch.tensor(3.0)
    assert wcr().item() == pytest.approx(3 * psi)
    net.zero_grad()
    wcr.add_grad_()
    tensor_grad = net.conv.weight.grad.clone()
    net.zero_grad()
    wcr.lam = 3.0
    wcr.add_grad_()
    torch.testing.assert_close(net.conv.weight.grad, tensor_grad)
    wcr.lam = 0.0
    net.zero_grad()
    assert wcr().item() == 0.0
    wcr.add_grad_()
    assert net.conv.weight.grad is None


def test_frozen_and_replaced_parameters(net):
    wcr = wcr_fast.WCR(net)
    net.conv.weight.requires_grad_(False)
    value = wcr().item()
    wcr.add_grad_()
    assert net.conv.weight.grad is None
    assert net.fc.weight.grad is not None
    assert value == pytest.approx(wcr_fast.WCR(net)().item())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    wcr.add_grad_()
    assert wcr.weights["fc.weight"] is net.fc.weight
    assert net.fc.weight.grad is not None
    del net.fc.weight
    with pytest.raises(RuntimeError, match=r"fc\.weight is no longer"):
        wcr()


def _change_data(net):
    net.fc.weight.data = net.fc.weight.data * 2


def _change_strides(net):
    net.square.weight.data = net.square.weight.data.t()
    net.square.weight.grad.data = net.square.weight.grad.data  # as it was


def _replace(net):
    grad = net.fc.weight.grad
    net.fc.weight = nn.Parameter(net.fc.weight.detach() * 3)
    net.fc.weight.grad = grad


def _change_dtype(net):
    net.double()


def _change_gradients(net):
    for p in net.parameters():
        p.grad = None if p.grad is None else torch.randn_like(p)


def _change_gradient_layout(net):
    net.fc.weight.grad = torch.randn(net.fc.weight.shape[::-1], device=net.fc.weight.device).t()


def _change_gradient_dtype(net):
    net.fc.weight.grad = None
    net.fc.weight.grad_dtype = None
    net.fc.weight.grad = torch.zeros_like(net.fc.weight, dtype=torch.float64)


def _drop_gradients(net):
    net.zero_grad(set_to_none=True)


def _drop_one_gradient(net):
    net.conv.weight.grad = None


def _freeze(net):
    net.conv.weight.requires_grad_(False)


CHANGES = [
    _change_data,
    _change_strides,
    _replace,
    _change_dtype,
    _change_gradients,
    _change_gradient_layout,
    _change_gradient_dtype,
    _drop_gradients,
    _drop_one_gradient,
    _freeze,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_between_two_calls_is_noticed(backend, net, change):
    net.square = nn.Linear(7, 7).to(net.fc.weight.device)
    wcr = wcr_fast.WCR(net, lam=0.5)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        wcr.add_grad_()
    assert (wcr._plan is not None) == (backend == "triton")
    change(net)
    before = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    wcr.add_grad_()
    got = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    for n, p in net.named_parameters():
        p.grad = before[n]
    wcr_fast.WCR(net, lam=0.5).add_grad_()
    for n, p in net.named_parameters():
        assert (p.grad is None) == (got[n] is None), n
        if p.grad is not None:
            assert torch.equal(p.grad, got[n]), n
    assert not torch.equal(net.fc.weight.grad, torch.zeros_like(net.fc.weight.grad))


def test_a_plan_follows_lam_eps_and_the_backend(backend, net):
    def added(reg):
        net.zero_grad(set_to_none=False)
        reg.add_grad_()
        return net.conv.weight.grad.clone()

    wcr = wcr_fast.WCR(net, lam=0.5)
    first = added(wcr)
    assert torch.equal(added(wcr), first)
    wcr.lam = 1.0
    torch.testing.assert_close(added(wcr), 2 * first)
    wcr.lam = torch.tensor(0.5, device=net.conv.weight.device)
    torch.testing.assert_close(added(wcr), first)
    wcr.lam, wcr.eps = 0.5, 1e-3
    assert torch.equal(added(wcr), added(wcr_fast.WCR(net, lam=0.5, eps=1e-3)))
    with wcr_fast.backend("torch"):
        other = added(wcr)
        assert wcr._plan is None
    assert reference.relative_error(other, added(wcr)) < 5e-6
    assert copy.deepcopy(wcr)._plan is None


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    wcr = wcr_fast.WCR(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="weight is sparse"):
        wcr.add_grad_()


def test_gradients_of_another_layout(backend, device):
    conv = nn.Conv2d(4, 6, 3).to(device, memory_format=torch.channels_last)
    reg = wcr_fast.WCR(conv, lam=1.0)
    reg.add_grad_()
    want = conv.weight.grad.clone()
    conv.weight.grad = torch.zeros(conv.weight.shape, device=device)
    assert conv.weight.grad.stride() != conv.weight.stride()
    reg.add_grad_()
    assert reference.relative_error(conv.weight.grad, want) < 4e-6


def test_adding_raises_the_version_of_the_gradient(backend, device):
    w = torch.randn(5, 5, device=device, requires_grad=True)
    w.grad = torch.zeros_like(w)
    before = w.grad._version
    wcr_fast.WCR([w]).add_grad_()
    assert w.grad._version > before


def test_moments_by_name(net):
    moments = wcr_fast.WCR(net).moments()
    mean, var = reference.moments(net.conv.weight, 1e-8)
    assert moments["conv.weight"] == pytest.approx((mean.item(), var.item()), rel=1e-5)


def test_inside_a_compiled_step(net):
    wcr = wcr_fast.WCR(net)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        return net.fc(x).square().mean() + wcr()

    x = torch.randn(2, 6)
    step(x).backward()
    got = net.conv.weight.grad.clone()
    net.zero_grad()
    (net.fc(x).square().mean() + wcr()).backward()
    torch.testing.assert_close(got, net.conv.weight.grad)


def test_add_grad_compiles_fullgraph(net):
    wcr = wcr_fast.WCR(net, lam=1.0)
    wcr.add_grad_()
    want = net.conv.weight.grad.clone()
    net.conv.weight.grad.zero_()
    torch.compile(wcr.add_grad_, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(net.conv.weight.grad, want)


def test_model_with_attached_regularizer_deepcopies(net):
    wcr_fast.WCR(net).attach(torch.optim.SGD(net.parameters(), lr=0.1))
    assert torch.equal(copy.deepcopy(net).fc.weight, net.fc.weight)


def test_empty_weights_are_left_out():
    assert "left out: weight (empty)" in repr(wcr_fast.WCR(nn.ModuleList([nn.Linear(2, 2), EmptyWeight()]))).replace(
        "1.weight", "weight"
    )


class EmptyWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0, 3))


def test_tensors_with_names():
    model = torch.nn.Linear(3, 4)
    reg = wcr_fast.L1([("a.weight", model.weight)])
    assert list(reg.weights) == ["a.weight"]
    with pytest.raises(TypeError, match="L1: b must be float16"):
        wcr_fast.L1([("b", torch.ones(3, dtype=torch.int64))])
