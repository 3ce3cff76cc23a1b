"""What a repeated call looks at: both ways to look find every change, and nothing else; building the compiled one."""

import contextlib
import os
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wcr_fast import native
from wcr_fast.watch import watch

_version = attrgetter("_version")


class Scene:
    """Parameters with gradients, a state for each, and a module that holds the first one."""

    def __init__(self, grads_written=False, count=3):
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(2, 3 + i)) for i in range(count)]
        for p in self.params:
            p.grad = torch.randn_like(p)
        self.states = [{"momentum_buffer": torch.zeros_like(p), "step": torch.zeros(())} for p in self.params]
        self.module = nn.Module()
        self.module.weight = self.params[0]
        self.written = [p.grad for p in self.params] if grads_written else self.params
        entries = [(state, name, t) for state in self.states for name, t in state.items()]
        entries.append((self.module._parameters, "weight", self.params[0]))
        arrays = [state["momentum_buffer"] for state in self.states]
        self.watch = watch(self.params, entries=entries, arrays=arrays, counted=[0, 2], grads_written=grads_written)

    def look(self):
        return self.watch.look(list(self.params))


def replaced_gradient(s):
    s.params[1].grad = torch.ones_like(s.params[1])


def written_weight(s):
    with torch.no_grad():
        s.params[2].add_(1.0)


HARMLESS = [lambda s: None, replaced_gradient, written_weight]


def no_gradient(s):
    s.params[1].grad = None


def gradient_of_another_layout(s):
    s.params[1].grad = torch.ones(4, 2).t()


def gradient_of_another_dtype(s):
    s.params[1].grad_dtype = None
    s.params[1].grad = torch.ones(2, 4, dtype=torch.bfloat16)


def sparse_gradient(s):
    s.params[1].grad = torch.ones(2, 4).to_sparse()


def moved_weight(s):
    s.params[1].data = s.params[1].data.clone()


def weight_of_another_dtype(s):
    s.params[1].data = s.params[1].data.double()


def transposed_weight(s):
    s.params[1].data = s.params[1].data.view(4, 2).t()


def frozen_weight(s):
    s.params[1].requires_grad_(False)


def other_parameter(s):
    s.params[1] = nn.Parameter(s.params[1].data)
    s.params[1].grad = torch.ones_like(s.params[1])


def parameter_gone(s):
    s.params.pop()


def replaced_in_the_module(s):
    s.module.weight = nn.Parameter(s.params[0].data)


def removed_from_the_module(s):
    del s.module.weight


def replaced_state(s):
    s.states[2]["momentum_buffer"] = s.states[2]["momentum_buffer"].clone()


def replaced_step(s):
    s.states[2]["step"] = torch.zeros(())


def missing_state(s):
    del s.states[1]["momentum_buffer"]


def state_of_none(s):
    s.states[1]["momentum_buffer"] = None


def transposed_state(s):
    array = s.states[1]["momentum_buffer"]
    array.data = array.data.view(4, 2).t()


def moved_state(s):
    array = s.states[1]["momentum_buffer"]
    array.data = array.data.clone()


CHANGES = [
    no_gradient,
    gradient_of_another_layout,
    gradient_of_another_dtype,
    sparse_gradient,
    moved_weight,
    weight_of_another_dtype,
    transposed_weight,
    frozen_weight,
    other_parameter,
    parameter_gone,
    replaced_in_the_module,
    removed_from_the_module,
    replaced_state,
    replaced_step,
    missing_state,
    state_of_none,
    transposed_state,
    moved_state,
]


@pytest.mark.parametrize("grads_written", [False, True])
def test_an_undisturbed_look(look, grads_written):
    scene = Scene(grads_written)
    before = list(map(_version, scene.written))
    for number, change in enumerate(HARMLESS):
        change(scene)
        counted = [scene.params[i]._version for i in (0, 2)]
        addresses, versions = scene.look()
        assert addresses.tolist() == [p.grad.data_ptr() for p in scene.params]
        assert versions.tolist() == counted
        written = [p.grad for p in scene.params] if grads_written else scene.params
        if number == 0:
            assert list(map(_version, written)) == [v + 1 for v in before]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(look, change):
    scene = Scene()
    assert scene.look() is not None
    if change is gradient_of_another_dtype and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("torch before 2.10 has no grad_dtype")
    change(scene)
    before = list(map(_version, scene.params))
    assert scene.look() is None
    assert list(map(_version, scene.params)) == before


def test_many_parameters(look):
    """More than are looked at together, and a change in the last of them."""
    scene = Scene(count=300)
    assert scene.look()[0].tolist() == [p.grad.data_ptr() for p in scene.params]
    scene.states[-1]["momentum_buffer"] = torch.zeros_like(scene.params[-1])
    assert scene.look() is None


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.sampled_from([*HARMLESS, *CHANGES]), max_size=4))
def test_both_ways_agree(changes):
    """The same changes done to two equal scenes, one watched by each."""
    try:
        compiled = native.build()
    except RuntimeError as error:
        pytest.skip(str(error))
    found = []
    for module in (None, compiled):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_module", module)
            scene = Scene()
            for change in changes:
                # one that undoes what another has done already may fail
                with contextlib.suppress(AttributeError, IndexError, KeyError, RuntimeError):
                    change(scene)
            grads = [p.grad for p in scene.params]
            seen = scene.look()
            if seen is not None:
                assert seen[0].tolist() == [g.data_ptr() for g in grads]
            found.append((None if seen is None else seen[1].tolist(), list(map(_version, scene.params))))
    assert found[0] == found[1]


def test_a_look_keeps_no_references(look):
    scene = Scene()
    objects = [*scene.params, *scene.states, *(p.grad for p in scene.params), scene.module._parameters]
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(100):
        scene.look()
    assert [sys.getrefcount(o) for o in objects] == before


def test_the_compiled_one_takes_over(monkeypatch):
    try:
        compiled = native.build()
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(native, "_module", None)
    scene = Scene()
    first = scene.look()
    assert scene.watch._compiled is None
    monkeypatch.setattr(native, "_module", compiled)
    scene.look()
    assert scene.watch._compiled is not None
    assert scene.look()[1].tolist() == [v + 2 for v in first[1]]


def test_what_cannot_be_watched():
    p = nn.Parameter(torch.ones(3))
    assert watch([p]) is None  # no gradient
    p.grad = torch.ones(3)

    class Special(torch.Tensor):
        pass

    assert watch([p], arrays=[torch.ones(3).as_subclass(Special)]) is None
    assert watch([p]) is not None


# --- building it ---------------------------------------------------------------------------------------------------

SCRIPT = """
import threading
import torch
from wcr_fast import native
print(native.state())
native.request()
for thread in threading.enumerate():
    if thread.name == "wcr_fast.native":
        thread.join()
print(native.state())
print(native.module() is not None)
"""


def files(folder):
    return [f.name for f in folder.iterdir() if f.name != ".lock"]


def run(**env):
    done = subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_without_a_compiler_everything_goes_on(tmp_path):
    before, after, loaded = run(CXX="false", WCR_FAST_CACHE=str(tmp_path / "cache"))
    assert before.startswith("not built yet")
    assert after.startswith("failed: false failed with exit code 1")
    assert loaded == "False"
    assert files(tmp_path / "cache") == []
    _, after, _ = run(CXX=str(tmp_path / "missing"), WCR_FAST_CACHE=str(tmp_path / "cache"))
    assert after.startswith("failed: ")
    (tmp_path / "file").touch()
    _, after, _ = run(WCR_FAST_CACHE=str(tmp_path / "file"))
    assert after.startswith("failed: ")


def test_it_can_be_switched_off(tmp_path):
    off = "off (WCR_FAST_NATIVE=0)"
    assert run(WCR_FAST_NATIVE="0", WCR_FAST_CACHE=str(tmp_path)) == [off, off, "False"]
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_used_is_no_disaster(tmp_path):
    (tmp_path / "home").touch()
    for home in (str(tmp_path / "home"), str(tmp_path / "home" / "below")):
        env = {"HOME": home, "WCR_FAST_CACHE": "", "XDG_CACHE_HOME": ""}
        _, after, loaded = run(**env)
        assert after.startswith("failed: ")
        assert loaded == "False"
    _, after, _ = run(CXX='g++ "x', WCR_FAST_CACHE=str(tmp_path / "cache"))
    assert after == "failed: No closing quotation"


def test_one_build_for_all_ranks(tmp_path):
    """Processes that start together wait for the first one's; one that is stopped leaves nothing behind."""
    try:
        built = native.build().__file__
    except RuntimeError as error:
        pytest.skip(str(error))
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(
        f'#!/bin/sh\necho built >> {log}\nsleep 1\nwhile [ "$1" != -o ]; do shift; done\nexec cp {built} "$2"\n'
    )
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "WCR_FAST_CACHE": str(tmp_path / "cache")}
    script = "from wcr_fast import native; native.build()"
    ranks = [subprocess.Popen([sys.executable, "-c", script], env=env) for _ in range(3)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert log.read_text() == "built\n"
    assert files(tmp_path / "cache") == [Path(built).name]

    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path / 'begun'}\nsleep 60 &\necho $! > {tmp_path / 'pid'}\nwait\n")
    env["WCR_FAST_CACHE"] = str(tmp_path / "other")
    script = f"""
import os, time
from wcr_fast import native
native.request()
while not os.path.exists({str(tmp_path / "pid")!r}):
    time.sleep(0.01)
"""
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=50)
    assert files(tmp_path / "other") == []
    helper = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    assert not helper.exists() or helper.read_text().split()[2] == "Z"


def test_a_damaged_file_is_built_anew(tmp_path):
    try:
        built = native.build().__file__
    except RuntimeError as error:
        pytest.skip(str(error))
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nexec cp {built} "$2"\n')
    compiler.chmod(0o755)
    damaged = tmp_path / "cache" / Path(built).name
    damaged.parent.mkdir()
    damaged.write_bytes(b"not a library")
    before, after, loaded = run(CXX="false", WCR_FAST_CACHE=str(damaged.parent))
    assert before.startswith("built, ")
    assert after.startswith("failed: false failed")
    assert loaded == "False"
    before, after, loaded = run(CXX=str(compiler), WCR_FAST_CACHE=str(damaged.parent))
    assert after == f"loaded, {damaged}"
    assert loaded == "True"
    assert files(damaged.parent) == [damaged.name]


def test_a_built_one_is_loaded_at_once():
    try:
        native.build()
    except RuntimeError as error:
        pytest.skip(str(error))
    before, after, loaded = run()
    assert before.startswith("built, ")
    assert after == f"loaded, {native.build().__file__}"
    assert loaded == "True"


def test_inference_tensors(look):
    """They count no versions: as gradients they do, as counted parameters they can't be watched."""
    p = nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        p.grad = torch.ones(3)
        q = nn.Parameter(torch.ones(3))
        q.grad = torch.ones(3)
    written = watch([p], grads_written=True)
    for _ in range(3):
        assert written.look()[0].tolist() == [p.grad.data_ptr()]
    assert watch([q], counted=[0]) is None
    uncounted = watch([q])
    assert uncounted.look() is not None
