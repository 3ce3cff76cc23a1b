"""Unmodified training frameworks: a regularizer by ``attach``, SAM where the framework passes a closure, S2SAM else.

They are heavy, so they are an extra: ``pip install -e ".[trainers]"``.
"""

import pytest
import torch
from torch import nn

import wcr_fast
from wcr_fast.optim import S2SAM, SAM, CrAM

STEPS, SIZE = 4, 8


class Net(nn.Module):
    """A small net with batch norm that computes its own loss, as the frameworks like it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3))

    def forward(self, inputs, labels):
        logits = self.layers(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(STEPS * SIZE, 6, generator=generator), torch.randint(3, (STEPS * SIZE,), generator=generator)
    return [{"inputs": a, "labels": b} for a, b in zip(x, y, strict=True)]


def batches():
    return list(torch.utils.data.DataLoader(rows(), batch_size=SIZE))


def by_hand(make, lam=0.0):
    """Train as the frameworks do, in an ordinary loop."""
    model = Net()
    optimizer = make(model)
    if lam:
        wcr_fast.WCR(model, lam=lam).attach(optimizer)
    for batch in batches():

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            loss.backward()
            return loss

        optimizer.step(closure)
    return model


def assert_close(one, other):
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), name


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


# --- Hugging Face ----------------------------------------------------------------------------------------------


def hugging_face(model, optimizer, folder):
    transformers = pytest.importorskip("transformers", reason='pip install -e ".[trainers]"')
    pytest.importorskip("accelerate", reason='pip install -e ".[trainers]"')

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=SIZE,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    InOrder(model=model, args=arguments, train_dataset=rows(), optimizers=(optimizer, None)).train()


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_with_a_regularizer(tmp_path):
    model = Net()
    optimizer = sgd(model)
    wcr_fast.WCR(model, lam=1e-3).attach(optimizer)
    hugging_face(model, optimizer, tmp_path)
    assert_close(model, by_hand(sgd, lam=1e-3))


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_with_s2sam_but_not_sam(tmp_path):
    model = Net()
    hugging_face(model, S2SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, model=model), tmp_path)
    assert_close(model, by_hand(lambda m: S2SAM(m, torch.optim.SGD, lr=0.1, rho=0.5)))
    model = Net()
    with pytest.raises(RuntimeError, match=r"SAM: step\(\) needs a closure.*S2SAM"):
        hugging_face(model, SAM(model, torch.optim.SGD, lr=0.1), tmp_path)


# --- Lightning -------------------------------------------------------------------------------------------------


def lightning(make, lam=0.0, **options):
    pl = pytest.importorskip("lightning", reason='pip install -e ".[trainers]"')

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            optimizer = make(self)
            if lam:
                wcr_fast.WCR(self, lam=lam).attach(optimizer)
            return optimizer

    module = Module()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=SIZE))
    return module.net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sgd", "sam", "cram", "s2sam"])
def test_lightning(kind):
    make = {
        "sgd": sgd,
        "sam": lambda m: SAM(m, torch.optim.SGD, lr=0.1, rho=0.5),
        "cram": lambda m: CrAM(m, torch.optim.SGD, lr=0.1, rho=0.5, sparsities=0.5),
        "s2sam": lambda m: S2SAM(m, torch.optim.SGD, lr=0.1, rho=0.5),
    }[kind]
    assert_close(lightning(make, lam=1e-3), by_hand(make, lam=1e-3))


# --- Accelerate ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason='pip install -e ".[trainers]"')
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net()
    model, optimizer = accelerator.prepare(model, SAM(model, torch.optim.SGD, lr=0.1, rho=0.5))
    wcr_fast.WCR(model, lam=1e-3).attach(optimizer)
    for batch in batches():

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    expected = by_hand(lambda m: SAM(m, torch.optim.SGD, lr=0.1, rho=0.5), lam=1e-3)
    assert_close(accelerator.unwrap_model(model), expected)


@pytest.mark.filterwarnings("ignore")
def test_lightning_that_accumulates_is_told_how():
    with pytest.raises(RuntimeError, match=r"added to them.*accumulate\(closure\)"):
        lightning(lambda m: SAM(m, torch.optim.SGD, lr=0.1), accumulate_grad_batches=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["cram", "s2sam"])
def test_accelerate_with_others(kind):
    accelerate = pytest.importorskip("accelerate", reason='pip install -e ".[trainers]"')
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net()
    if kind == "s2sam":
        optimizer = S2SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, model=model)
    else:
        optimizer = CrAM(model, torch.optim.SGD, lr=0.1, rho=0.5, sparsities=0.5)
    wcr_fast.WCR(model, lam=1e-3).attach(optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for batch in batches():

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = prepared(**batch)["loss"]
            accelerator.backward(loss)
            return loss

        if kind == "s2sam":
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    if kind == "s2sam":
        expected = by_hand(lambda m: S2SAM(m, torch.optim.SGD, lr=0.1, rho=0.5), lam=1e-3)
    else:
        expected = by_hand(lambda m: CrAM(m, torch.optim.SGD, lr=0.1, rho=0.5, sparsities=0.5), lam=1e-3)
    assert_close(model, expected)
