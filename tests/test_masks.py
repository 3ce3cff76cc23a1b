"""Masks: what they are made from, what they do to models, files, and optimizers that train under them."""

import copy
import hashlib
import importlib
import io
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

import wcr_fast
from wcr_fast.errors import UsageError
from wcr_fast.pruning import Masks, dense_state_dict
from wcr_fast.torch_path import bits


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 3))


@pytest.fixture(autouse=True)
def one_thread():
    """Nets of a few hundred weights only wait for further threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_tie():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    return model


def removed_stay_zero(model, masks):
    """Whether every removed weight is +0.0."""
    params = dict(model.named_parameters())
    return all(not params[name][~masks[name]].view(torch.int32).any() for name in masks)


def optimizer_of(module, name, **options):
    def make(params):
        return getattr(importlib.import_module(module), name)(params, **options)

    return make


def ours(name):
    missing = False
    try:
        importlib.import_module("wcr_fast.optim")
    except ImportError:
        missing = True
    return pytest.mark.skipif(missing, reason=f"wcr_fast.optim.{name} is not there")


SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}
ADAM = {"lr": 1e-2, "weight_decay": 1e-2}
OPTIMIZERS = [
    pytest.param(optimizer_of("torch.optim", "SGD", **SGD), id="SGD"),
    pytest.param(optimizer_of("torch.optim", "Adam", **ADAM), id="Adam"),
    pytest.param(optimizer_of("torch.optim", "AdamW", amsgrad=True, **ADAM), id="AdamW"),
    pytest.param(optimizer_of("torch.optim", "Adam", fused=True, **ADAM), id="Adam-fused"),
    pytest.param(optimizer_of("wcr_fast.optim", "SGD", **SGD), id="wcr-SGD", marks=ours("SGD")),
    pytest.param(optimizer_of("wcr_fast.optim", "SGD", penalty="wcr", lam=1e-6, **SGD), id="WCR", marks=ours("SGD")),
    pytest.param(optimizer_of("wcr_fast.optim", "AdamW", **ADAM), id="wcr-AdamW", marks=ours("AdamW")),
]  # fmt: skip


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_thousand_steps(make, tmp_path):
    """Accumulation, clipping, a scaler with overflows, a mean of the weights, and a resume in the middle."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(32, 1, 6, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    model = small()
    optimizer, scaler = make(model.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=50)
    overflows = 0

    def step(number):
        nonlocal overflows
        optimizer.zero_grad()
        for part in range(2):
            picked = torch.arange(8) + (8 * (2 * number + part)) % 32
            scaler.scale(nn.functional.cross_entropy(model(inputs[picked]), targets[picked]) / 2).backward()
        if number % 97 == 13:
            model[1].weight.grad.view(-1)[5] = float("inf")
            overflows += 1
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < before) == (number % 97 == 13)

    for number in range(20):  # dense: momentum of weights that will be removed
        step(number)
    masks = Masks.from_sparsity(model, 0.8)
    masks.keep(optimizer)
    average = copy.deepcopy(model)
    assert removed_stay_zero(model, masks)
    start = model[1].weight.detach().clone()
    for number in range(20, 1020):
        step(number)
        assert removed_stay_zero(model, masks), number
        with torch.no_grad():
            for mean, param in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(param, 0.1)
        if number == 520:
            saved = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), scaler.state_dict()], saved)
            masks.save(tmp_path / "masks.safetensors")
            saved.seek(0)
            states = torch.load(saved, weights_only=True)
            model = small()
            optimizer, scaler = make(model.parameters()), torch.amp.GradScaler("cpu")
            for target, state in zip((model, optimizer, scaler), states, strict=True):
                target.load_state_dict(state)
            masks = Masks.load(tmp_path / "masks.safetensors")
            assert masks.digest(model) == masks.weights_sha256
            masks.keep(optimizer, model)
            assert removed_stay_zero(model, masks)
    masks.apply_(average)
    assert removed_stay_zero(average, masks)
    assert overflows == 11
    moved = model[1].weight.detach() != start
    assert moved[masks["1.weight"]].float().mean() > 0.9
    for param in model.parameters():
        for state in optimizer.state[param].values():
            assert not isinstance(state, torch.Tensor) or state.isfinite().all()


def test_momentum_alone_moves_nothing(backend, device):
    """Without the hook weights leave zero by momentum; with it state is zeroed as well."""
    model = nn.Linear(40, 30).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.weight.grad, model.bias.grad = torch.randn(30, 40, device=device), torch.ones(30, device=device)
    optimizer.step()
    masks = Masks.from_sparsity(model, 0.5)
    loose = copy.deepcopy(model)
    masks.apply_(loose)
    free = torch.optim.Adam(loose.parameters(), lr=0.1)
    free.load_state_dict(optimizer.state_dict())
    loose.weight.grad = torch.zeros_like(loose.weight)
    free.step()
    assert loose.weight[~masks["weight"]].count_nonzero()

    version = model.weight._version
    with masks.keep(optimizer):
        assert model.weight._version > version
        state = optimizer.state[model.weight]
        for _ in range(2):
            assert not any(t[~masks["weight"]].any() for t in (model.weight, state["exp_avg"], state["exp_avg_sq"]))
            version = model.weight._version
            optimizer.step()
            assert model.weight._version >= version + 2  # the step's and ours
    assert optimizer.state[model.bias]["exp_avg"].all()
    optimizer.step()
    assert model.weight[~masks["weight"]].count_nonzero()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_ends_with_remove(make):
    model = nn.Linear(8, 8)
    optimizer = make(model.parameters())
    masks = Masks.from_sparsity(model, 0.5)
    handle = masks.keep(optimizer)
    with pytest.raises(ValueError, match=r"weight is kept by .* already"):
        masks.keep(optimizer)
    handle.remove()
    handle.remove()
    masks.keep(optimizer).remove()
    model.weight.grad = torch.ones(8, 8)
    optimizer.step()
    assert model.weight.all()
    with masks.keep(optimizer):
        optimizer.step()
        assert removed_stay_zero(model, masks)


@pytest.mark.parametrize("make", [o for o in OPTIMIZERS if o.id != "WCR"])  # a penalty has weights of its own
@pytest.mark.parametrize("how", ["assign", "data", "layout"])
def test_weights_that_are_replaced_or_moved(make, how):
    model = nn.Conv2d(4, 6, 3, bias=False)
    optimizer = make(model.parameters())
    masks = Masks.from_sparsity(model, 0.5)
    masks.keep(optimizer)
    for _ in range(2):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    if how == "assign":
        model.load_state_dict({"weight": torch.ones(6, 4, 3, 3)}, assign=True)
        optimizer.param_groups[0]["params"] = list(model.parameters())
    elif how == "data":
        model.weight.data = torch.ones(6, 4, 3, 3)
    else:
        model.weight.data = torch.ones(6, 4, 3, 3).to(memory_format=torch.channels_last)
        optimizer.state.clear()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert removed_stay_zero(model, masks)
    assert model.weight[masks["weight"]].all()
    for state in optimizer.state[model.weight].values():
        if isinstance(state, torch.Tensor) and state.shape == model.weight.shape:
            assert not state[~masks["weight"]].any()


def test_a_replaced_weight_that_nobody_owns_is_zeroed_too():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = Masks.from_sparsity(model, 0.5)
    masks.keep(optimizer)
    model.load_state_dict({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, assign=True)
    optimizer.step()
    assert removed_stay_zero(model, masks)
    model.weight = nn.Parameter(torch.ones(2, 8))
    with pytest.raises(RuntimeError, match=r"weight was replaced: it has shape \(2, 8\) now, its mask \(4, 4\)"):
        optimizer.step()


def test_state_in_another_layout_than_its_weight(backend, device):
    weight = nn.Parameter(torch.randn(4, 3, 5, 5, device=device).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    masks = Masks.from_sparsity([weight], 0.5)
    masks.keep(optimizer)
    for _ in range(3):
        weight.grad = torch.randn(4, 3, 5, 5, device=device)
        optimizer.step()
        buffer = optimizer.state[weight]["momentum_buffer"]
        for tensor in (weight, buffer):
            assert not tensor[~masks["weights[0]"]].any()
            assert tensor[masks["weights[0]"]].all()


def test_counters_and_other_state_stay():
    weight = nn.Parameter(torch.tensor(2.0))  # its step counter has its shape
    optimizer = torch.optim.Adam([weight])
    masks = Masks.from_masks([torch.tensor(False)], [weight])
    masks.keep(optimizer)
    for _ in range(3):
        weight.grad = torch.ones(())
        optimizer.step()
    assert optimizer.state[weight]["step"] == 3
    assert weight == 0
    optimizer.state[weight]["codes"] = torch.ones((), dtype=torch.int16)
    optimizer.step()
    assert optimizer.state[weight]["codes"] == 1


def test_each_optimizer_keeps_what_it_owns():
    model = net()
    masks = Masks.from_sparsity(model, 0.5)
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 4))
    masks.keep(first)
    assert (model[0].weight == 0).any()
    assert model[4].weight.all()
    masks.keep(second)
    assert (model[4].weight == 0).any()
    second.add_param_group({"params": list(model[6].parameters())})
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    first.step(), second.step()
    assert removed_stay_zero(model, masks)


def test_wrappers_names_and_closures():
    model = nn.Linear(6, 6)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)

    class Wrapper:
        def __init__(self):
            self.optimizer = optimizer

    masks = pickle.loads(pickle.dumps(Masks.from_sparsity(model, 0.5)))
    with masks.keep(Wrapper()):  # by the names that the optimizer has

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 6)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert removed_stay_zero(model, masks)
    unnamed = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"name the model: keep\(optimizer, model\)"):
        masks.keep(unnamed)
    with pytest.raises(ValueError, match="SGD owns none of the masked weights"):
        masks.keep(unnamed, copy.deepcopy(model))
    with pytest.raises(TypeError, match="expected a torch optimizer, got Linear"):
        masks.keep(model)


def test_the_model_stays_what_it_is():
    model = net()
    names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
    params = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = Masks.from_sparsity(model, 0.5)
    masks.keep(optimizer)
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    clone = copy.deepcopy(model)
    assert removed_stay_zero(clone, masks)
    copy.deepcopy(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    assert removed_stay_zero(model, masks)


def test_masks_hold_no_model():
    import weakref

    model = nn.Linear(4, 4)
    masks = Masks.from_model(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None
    with pytest.raises(ValueError, match="name the model"):
        masks.keep(torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=0.1))


def test_one_bit_per_weight():
    masks = Masks.from_sparsity(nn.Linear(400, 400, bias=False), 0.5)
    assert len(pickle.dumps(masks)) < 400 * 400 / 8 + 2000
    for other in (copy.deepcopy(masks), pickle.loads(pickle.dumps(masks))):
        assert torch.equal(other["weight"], masks["weight"])
        assert other.kept == masks.kept == 80000
    assert masks.total == 160000
    assert masks.sparsity == 0.5
    assert repr(masks) == "Masks(1 layer, 80,000 of 160,000 weights kept, sparsity 0.5000)"


@pytest.mark.parametrize(("sparsity", "scope"), [(0.37, "global"), (0.9, "layer"), (0.5, "row"), (None, "2:4")])
def test_from_sparsity_is_exact(sparsity, scope):
    model = net().to(memory_format=torch.channels_last)
    masks = Masks.from_sparsity(model, sparsity, scope)
    wanted = wcr_fast.magnitude_masks(model, sparsity, scope=scope)
    assert list(masks) == ["0.weight", "4.weight", "6.weight"]
    assert all(torch.equal(masks[n], m) for n, m in zip(masks, wanted, strict=True))
    assert masks.kept == sum(int(m.sum()) for m in wanted)
    pruned = copy.deepcopy(model)
    wcr_fast.prune_(pruned, sparsity, scope=scope)
    masks.apply_(model)
    for a, b in zip(model.parameters(), pruned.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    again = Masks.from_model(model)
    assert all(torch.equal(again[n], masks[n]) for n in masks)


def test_from_model_takes_zeros():
    weight = torch.tensor([[0.0, -0.0, 1e-45, float("nan")]])
    masks = Masks.from_model([weight])
    assert masks["weights[0]"].tolist() == [[False, False, True, True]]
    masks.apply_([weight])
    assert weight.view(torch.int32)[0, :3].tolist() == [0, 0, 1]  # +0.0; what stays, stays to the bit
    assert weight[0, 3].isnan()
    with pytest.raises(ValueError, match=r"0.weight_orig is under torch.nn.utils.prune: use Masks.from_torch_prune"):
        Masks.from_model(torch_pruned())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_threshold_keeps_what_reaches_it(dtype):
    weight = torch.tensor([[0.1, -0.1, 0.25, -0.25, 0.3, float("inf"), 0.0, -0.0]], dtype=dtype)
    assert Masks.from_threshold([weight], 0.25)["weights[0]"][0].tolist() == [False, False, *[True] * 4, False, False]
    # Exactly: 0.1 in these dtypes is not 0.1.
    stored = weight[0, 0].item()
    assert Masks.from_threshold([weight], stored)["weights[0]"][0, 0]
    assert Masks.from_threshold([weight], 0.1)["weights[0]"][0, 0] == (stored >= 0.1)
    assert Masks.from_threshold([weight], 0.0).kept == 8
    assert Masks.from_threshold([weight], float("inf")).kept == 1


def test_from_threshold_says_how_many():
    model = net()
    threshold = wcr_fast.magnitude_threshold(model, 0.7)
    masks = Masks.from_threshold(model, threshold, exclude="6")
    weights = [model[0].weight, model[4].weight]
    assert masks.kept == sum(int((w.abs() >= threshold).sum()) for w in weights)
    assert masks.total == sum(w.numel() for w in weights)
    assert masks.sparsity == 1 - masks.kept / masks.total
    with pytest.raises(ValueError, match="threshold must be a magnitude, 0 or more, got nan"):
        Masks.from_threshold(model, float("nan"))


def test_from_masks_is_exact():
    model = net()
    given = [torch.rand(w.shape) < 0.3 for w in (model[0].weight, model[4].weight)]
    masks = Masks.from_masks(given, model, exclude="6")
    named = Masks.from_masks({"0.weight": given[0], "4.weight": given[1]}, model)
    for made in (masks, named):
        assert torch.equal(made["0.weight"], given[0])
        assert torch.equal(made["4.weight"], given[1])
    assert "0.weight" in masks
    assert "6.weight" not in masks
    empty = Masks.from_masks({})
    assert (empty.total, empty.kept, empty.sparsity, len(empty)) == (0, 0, 0.0, 0)


def test_biases_and_odd_shapes():
    tensors = [torch.randn(shape) for shape in ((), (1,), (0, 3), (7,), (2, 1, 3, 1, 2))]
    tensors.append(torch.randn(3, 8)[:, ::2])
    given = [torch.rand(t.shape) < 0.5 for t in tensors]
    wanted = [torch.where(m, t, 0.0) for t, m in zip(tensors, given, strict=True)]
    Masks.from_masks(given, tensors).apply_(tensors)
    assert all(torch.equal(t, w) for t, w in zip(tensors, wanted, strict=True))


def test_mixed_dtypes(backend, device):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    tensors = [torch.randn(33, 5).to(device, d) for d in dtypes]
    masks = Masks.from_sparsity(tensors, 0.6)
    wanted = [torch.where(masks[f"weights[{i}]"], t, torch.zeros_like(t)) for i, t in enumerate(tensors)]
    masks.apply_(tensors)
    assert all(torch.equal(t, w) for t, w in zip(tensors, wanted, strict=True))


def test_tied_weights_count_once():
    model = with_tie()
    masks = Masks.from_sparsity(model, 0.5)
    assert list(masks) == ["embedding.weight"]
    masks.apply_(model)
    assert model["head"].weight is model["embedding"].weight
    assert int(model["head"].weight.count_nonzero()) == 12
    mask = masks["embedding.weight"]
    both = Masks.from_masks({"embedding.weight": mask, "head.weight": mask})
    both.keep(torch.optim.SGD(model.parameters(), lr=0.1), model)
    different = Masks.from_masks({"embedding.weight": mask, "head.weight": ~mask})
    with pytest.raises(ValueError, match=r"embedding.weight and head.weight are one parameter, their masks differ"):
        different.apply_(model)


def test_averaged_and_compiled_models():
    model = net()
    masks = Masks.from_sparsity(model, 0.5)
    average = torch.optim.swa_utils.AveragedModel(model)
    masks.apply_(average)
    assert removed_stay_zero(average.module, masks)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    masks.apply_(compiled)
    assert removed_stay_zero(compiled._orig_mod, masks)
    state = model.state_dict()
    masks.apply_(state)
    assert removed_stay_zero(model, masks)  # a state_dict shares the model's memory


def test_a_mask_that_does_not_fit_writes_nothing():
    model = net()
    masks = Masks.from_sparsity(model, 0.5)
    other = nn.Sequential(*net()[:4], nn.Linear(64, 9))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"apply_: there is no parameter 6.weight; there are: 0.weight, 0.bias, "):
        masks.apply_(other)
    other.append(nn.ReLU()).append(nn.Linear(9, 3))
    with pytest.raises(ValueError, match=r"apply_: 4.weight has shape \(9, 64\), its mask \(8, 64\)"):
        masks.apply_(other)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(TypeError, match=r"4.weight must be float16, bfloat16, float32 or float64, got torch.int8"):
        masks.apply_(model.state_dict() | {"4.weight": torch.ones(8, 64, dtype=torch.int8)})
    with pytest.raises(ValueError, match="expanded or overlaps itself"):
        masks.apply_(model.state_dict() | {"4.weight": torch.ones(8, 1).expand(8, 64)})
    with pytest.raises(ValueError, match="meta device"):
        masks.apply_(net().to("meta"))


def test_wrong_masks_are_refused():
    model = net()
    with pytest.raises(TypeError, match=r"the mask of a must be a bool tensor .* got torch.float32"):
        Masks.from_masks({"a": torch.ones(3)})
    with pytest.raises(TypeError, match="got list"):
        Masks.from_masks({"a": [True]})
    with pytest.raises(ValueError, match="masks without names need their model"):
        Masks.from_masks([torch.ones(3, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"1 masks for 3 weights: 0.weight, 4.weight, 6.weight"):
        Masks.from_masks([torch.ones(3, dtype=torch.bool)], model)
    with pytest.raises(ValueError, match="from_masks: there is no parameter a"):
        Masks.from_masks({"a": torch.ones(3, dtype=torch.bool)}, model)
    for broken in (lambda m: Masks.from_sparsity(m, 0.5), lambda m: Masks.from_threshold(m, 0.5)):
        with torch.no_grad():
            model[4].weight[2, 3] = float("nan")
        with pytest.raises(ValueError, match=r"4.weight holds NaN"):
            broken(model)
    with pytest.raises(ValueError, match="nothing to prune"):
        Masks.from_model(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="matches no parameter"):
        Masks.from_sparsity(model, 0.5, exclude="nothing")
    with pytest.raises(ValueError, match="must lie in"):
        Masks.from_sparsity(model, 90)


def test_save_and_load(tmp_path):
    model = net().to(memory_format=torch.channels_last)
    masks = Masks.from_sparsity(model, 0.5)
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]
    stored = load_file(path)
    assert list(Masks.load(path)) == list(masks)
    for name in masks:  # plain bits, lowest first, in logical order
        assert stored[name].dtype == torch.uint8
        bools = torch.tensor([byte >> k & 1 for byte in stored[name].tolist() for k in range(8)], dtype=torch.bool)
        assert torch.equal(bools[: masks[name].numel()], masks[name].reshape(-1))
    loaded = Masks.load(str(path))
    assert all(torch.equal(loaded[n], masks[n]) for n in masks)
    # The hash is that of the weights, whether or not what is removed is still there.
    assert loaded.digest(model) == loaded.weights_sha256
    loaded.apply_(model)
    assert loaded.digest(model) == loaded.digest(model.state_dict()) == loaded.weights_sha256
    loaded.save(path)  # replaces; the hash stays
    assert Masks.load(path).weights_sha256 == loaded.weights_sha256
    with torch.no_grad():
        model[6].weight[masks["6.weight"]] *= 2
    assert loaded.digest(model) != loaded.weights_sha256
    loaded.save(path, model)
    assert Masks.load(path).weights_sha256 == loaded.digest(model)


def test_masks_of_nothing_and_of_odd_sizes_are_saved(tmp_path):
    given = {f"{n}": torch.rand(n) < 0.5 for n in (0, 1, 31, 32769)} | {"0-d": torch.tensor(True)}
    Masks.from_masks(given).save(tmp_path / "a")
    loaded = Masks.load(tmp_path / "a")
    assert loaded.weights_sha256 is None
    assert all(torch.equal(loaded[name], mask) for name, mask in given.items())
    Masks.from_masks({}).save(tmp_path / "b")
    assert len(Masks.load(tmp_path / "b")) == 0


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "masks.safetensors"
    with pytest.raises(UsageError, match=r"masks.safetensors: No such file"):
        Masks.load(path)
    save_file({"w": torch.ones(3)}, path)
    with pytest.raises(UsageError, match=r"masks.safetensors: not a file of masks .*write one with Masks.save"):
        Masks.load(path)
    save_file({"w": torch.ones(3)}, path, {"format": "wcr-fast/masks/9"})
    with pytest.raises(UsageError, match="format 'wcr-fast/masks/9' is not known; update wcr-fast"):
        Masks.load(path)
    save_file({"w": torch.ones(3)}, path, {"format": "wcr-fast/masks/1", "shapes": "[3]"})
    with pytest.raises(UsageError, match=r"masks.safetensors: damaged file of masks: no shapes"):
        Masks.load(path)
    save_file({"w": torch.ones(3)}, path, {"format": "wcr-fast/masks/1", "shapes": json.dumps({"v": [3]})})
    with pytest.raises(UsageError, match="shapes and tensors have different names"):
        Masks.load(path)
    save_file({"w": torch.ones(3)}, path, {"format": "wcr-fast/masks/1", "shapes": json.dumps({"w": [3]})})
    with pytest.raises(UsageError, match=r"'w' is not the bits of shape \(3,\)"):
        Masks.load(path)
    Masks.from_masks({"w": torch.ones(9, 9, dtype=torch.bool)}).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    with pytest.raises(UsageError, match=r"the bits don't match bits_sha256; write it again with Masks.save"):
        Masks.load(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match="truncated"):
        Masks.load(path)
    masks = Masks.from_masks({"w": torch.ones(9, dtype=torch.bool)})
    with pytest.raises(UsageError, match="this is a folder: name a file in it"):
        masks.save(tmp_path)
    with pytest.raises(UsageError, match="No such file or directory"):
        masks.save(tmp_path / "no" / "folder")
    with pytest.raises(UsageError, match="can't hold a tensor named '__metadata__'"):
        Masks.from_masks({"__metadata__": torch.ones(1, dtype=torch.bool)}).save(path)
    assert path.read_bytes() == whole[:-1]


def torch_pruned():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    for layer, amount in ((model[0], 0.5), (model[2], 0.25)):
        torch_prune.l1_unstructured(layer, "weight", amount)
    return model


def test_a_torch_prune_state_dict_is_read():
    pruned = torch_pruned()
    state = pruned.state_dict()
    masks = Masks.from_torch_prune(state)
    assert list(masks) == ["0.weight", "2.weight"]
    assert masks.kept == 15 + 15
    plain = dense_state_dict(state)
    fresh = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    fresh.load_state_dict(plain)
    x = torch.randn(3, 6)
    assert torch.equal(fresh(x), pruned(x))
    assert removed_stay_zero(fresh, masks)
    with pytest.raises(ValueError, match=r"no NAME_orig with a NAME_mask"):
        Masks.from_torch_prune(plain)
    with pytest.raises(ValueError, match=r"0.weight_orig has shape \(5, 6\), its mask \(2,\)"):
        dense_state_dict(state | {"0.weight_mask": torch.ones(2)})


def test_a_torch_prune_state_dict_is_written():
    pruned = torch_pruned()
    masks = Masks.from_torch_prune(pruned.state_dict())
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    written = masks.to_torch_prune(model.state_dict())
    assert written.keys() == pruned.state_dict().keys()
    pruned.load_state_dict(written)
    assert all(torch.equal(Masks.from_torch_prune(written)[n], masks[n]) for n in masks)
    assert torch.equal(written["0.weight_orig"], model[0].weight)  # nothing is lost under the mask
    masks.apply_(model)
    x = torch.randn(3, 6)
    assert torch.equal(pruned(x), model(x))
    with pytest.raises(ValueError, match=r"to_torch_prune: there is no parameter 0.weight"):
        masks.to_torch_prune({})


@pytest.mark.parametrize("make", [o for o in OPTIMIZERS if o.id in ("AdamW", "wcr-SGD", "WCR", "wcr-AdamW")])
def test_a_few_steps_on_both_backends(make, backend, device):
    model = net().to(device)
    optimizer = make(model.parameters())
    masks = Masks.from_sparsity(model, 0.7)
    with masks.keep(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 1, 6, 6, device=device)).square().sum().backward()
            optimizer.step()
            assert removed_stay_zero(model, masks)
    optimizer.step()
    assert not removed_stay_zero(model, masks)


@pytest.mark.parametrize("master", [None, "float32", "remainder"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=ours(name)) for name in ("SGD", "AdamW")])
def test_narrow_weights_with_a_wider_copy(name, master, backend, device):
    model = nn.Linear(40, 30, bias=False).to(device, torch.bfloat16)
    optimizer = optimizer_of("wcr_fast.optim", name, lr=0.1, weight_decay=0.1, master=master)(model.parameters())
    for number in range(6):
        if number == 3:
            masks = Masks.from_sparsity(model, 0.5)
            masks.keep(optimizer)
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        if number >= 3:
            assert not model.weight[~masks["weight"]].view(torch.int16).any()
            assert model.weight.isfinite().all()


def test_words_are_packed_again_only_when_they_must(monkeypatch):
    from wcr_fast.pruning import keep

    packed = []
    monkeypatch.setattr(keep, "words_for", lambda *args: packed.append(1) or bits.words_for(*args))
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    Masks.from_sparsity(model, 0.5).keep(optimizer)
    for _ in range(3):
        model.weight.grad = torch.ones(4, 4)
        optimizer.step()
    assert len(packed) == 1
    model.weight.data = model.weight.data.t()
    optimizer.step()
    assert len(packed) == 2


def test_the_format_as_documented(tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[1] / "docs" / "mask-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    model = nn.Linear(7, 5)
    masks = Masks.from_sparsity(model, 0.5)
    monkeypatch.chdir(tmp_path)
    masks.save("masks.safetensors")
    names = {}
    exec(compile(code, "mask-format.md", "exec"), names)
    assert torch.equal(torch.from_numpy(names["mask"]), masks["weight"])
    sha = hashlib.sha256(b'["weight", "float32", [5, 7]]')
    sha.update(torch.where(masks["weight"], model.weight, 0.0).detach().numpy().tobytes())
    assert Masks.load("masks.safetensors").weights_sha256 == sha.hexdigest()


@pytest.fixture
def second_of_two_ranks():
    """A process group of two whose other member is not there: enough where nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield torch.distributed.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dim", [0, 1])
def test_each_rank_masks_its_shard(second_of_two_ranks, dim):
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.randn(5, 7)
    mask = Masks.from_sparsity([whole], 0.5)["weights[0]"]
    masks = Masks.from_masks({"weight": mask})
    model = nn.Linear(7, 5, bias=False)

    def shard(tensor):
        return distribute_tensor(tensor, second_of_two_ranks, [Shard(dim)], src_data_rank=None)

    mine = (lambda t: t[3:]) if dim == 0 else (lambda t: t[:, 4:])
    model.weight = nn.Parameter(shard(whole))
    masks.apply_(model)
    assert torch.equal(model.weight.to_local(), mine(torch.where(mask, whole, 0.0)))
    model.weight = nn.Parameter(shard(whole))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.keep(optimizer, model)
    for _ in range(3):
        model.weight.grad = shard(torch.ones(5, 7))
        optimizer.step()
        for tensor in (model.weight, optimizer.state[model.weight]["momentum_buffer"]):
            assert torch.equal(tensor.detach().to_local() != 0, mine(mask))


def test_emptied_layers_are_warned_about():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"from_sparsity: nothing is left of 1\.weight") as caught:
        masks = Masks.from_sparsity(model, 0.5)
    assert caught[0].filename == __file__
    assert not masks["1.weight"].any()
    with pytest.warns(UserWarning, match=r"from_threshold: nothing is left of 1\.weight") as caught:
        Masks.from_threshold(model, 0.01)
    assert caught[0].filename == __file__


def test_masks_are_read_like_a_dictionary():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    masks = Masks.from_sparsity(model, 0.5, "layer")
    assert list(masks.keys()) == ["0.weight", "1.weight"]
    found = dict(masks)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it imports its compiler
def test_names_are_the_models_own_inside_of_wrappers():
    model = nn.Sequential(nn.Linear(8, 8))
    for wrapper in (nn.DataParallel(model), torch.compile(model), torch.optim.swa_utils.AveragedModel(model)):
        masks = Masks.from_sparsity(wrapper, 0.5)
        assert list(masks) == ["0.weight"]
        masks.apply_(wrapper)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("keep: expected a torch optimizer, got Linear", lambda m: Masks.from_sparsity(m, 0.5).keep(m)),
        ("state_dict of a model under torch.nn.utils.prune, got Linear", Masks.from_torch_prune),
        ("got OrderedDict: give its .items", lambda m: Masks.from_sparsity(m.state_dict(), 0.5)),
    ],
)
def test_other_things_than_asked_for(match, call):
    with pytest.raises(TypeError, match=match):
        call(nn.Linear(3, 4))
