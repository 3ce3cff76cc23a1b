"""What ``test_launch`` runs in a process of its own: kernels are compiled there, and a driver notes their launches."""

import json
import traceback

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from wcr_fast.kernels import launch as launching
from wcr_fast.kernels import moments
from wcr_fast.kernels.launch import launch

from benchmarks.stub import StubDriver, stubbed
from wcr_fast.optim import ASAM, SAM

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n) * scale
    tl.store(y_ptr + i, x + x if TWICE else x, mask=i < n)


def copy(x, y, n=100, scale=1.5, *, programs=3, twice=False, options=OPTIONS):
    launch(copy_kernel, programs, (x, y, n, scale), {"BLOCK": 128, "TWICE": twice}, options)


def forms():
    return len(launching._prepared)


def case_the_launcher_gets_what_the_ordinary_way_gives_it(launches):
    x, y = torch.zeros(100), torch.zeros(100)
    copy(x, y)
    copy(x, y, 101, 2.5, programs=7)
    copy(x, y, 102, 3.5, programs=8)
    kernel = copy_kernel[(8,)]
    kernel(x, y, 102, 3.5, BLOCK=128, TWICE=False, **OPTIONS)
    direct, ordinary = launches[-2:]
    assert len(launches) == 4
    assert forms() == 1
    differing = [i for i, (a, b) in enumerate(zip(direct, ordinary, strict=True)) if a is not b and a != b]
    assert differing == [6, 7, 8], differing  # no hooks to call, so none are handed on
    assert direct[6:9] == (None, None, None)


def case_every_launcher_takes_it(launches):
    rows = torch.zeros(1, 4, dtype=torch.int64)
    owners, counters = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    partials, stats = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    for _ in range(3):
        moments.launch_moments(
            rows, owners, partials, counters, stats, None, dtype=torch.float32, r=0.0, rule=None, total=5
        )
    assert forms() == 1
    assert [call[0] for call in launches] == [2, 2, 2]


def case_the_key_is_as_fine_as_tritons(launches):
    wide, narrow = torch.zeros(132), torch.zeros(132, dtype=torch.bfloat16)
    base = {"x": wide, "y": wide}
    differing = [
        {},
        {"x": narrow},
        {"x": wide[1:]},
        {"n": 1},
        {"n": 16},
        {"n": 2**31 + 1},
        {"n": 2**31 + 16},
        {"n": 2**63 + 1},
        {"n": True},
        {"scale": 2},
        {"twice": True},
        {"options": {**OPTIONS, "num_warps": 8}},
    ]
    compiled = copy_kernel.device_caches[-1][0]
    for number, change in enumerate(differing, 1):
        for _ in range(2):
            copy(**{**base, **change})
        assert forms() == number, change
        assert len(compiled) == number, change
    same = [{"n": 7}, {"n": -5}, {"x": narrow, "n": 33}, {"x": wide[4:]}, {"scale": 0.1}, {"n": 48}, {"programs": 9}]
    for change in same:
        copy(**{**base, **change})
    assert forms() == len(compiled) == len(differing)
    assert len(launches) == 2 * len(differing) + len(same)


def case_another_device_or_driver_is_another_form(launches):
    x = torch.zeros(100)
    copy(x, x)
    driver = StubDriver(launches)
    driver.get_current_device = lambda: -2
    triton.runtime.driver.set_active(driver)
    copy(x, x)
    assert forms() == 2


def case_it_stands_aside(launches):
    x = torch.zeros(100)
    copy(x, x)
    seen = []
    runtime, hook = triton.knobs.runtime, lambda metadata: seen.append(metadata)
    runtime.launch_enter_hook.add(hook)
    copy(x, x)
    assert launches[-1][7] is runtime.launch_enter_hook  # the real launcher calls it
    runtime.launch_enter_hook.remove(hook)
    copy(x, x)
    assert launches[-1][7] is None
    copy_kernel.pre_run_hooks.append(lambda *args, **kwargs: seen.append("before"))
    copy(x, x)
    assert seen == ["before"]
    copy_kernel.pre_run_hooks.clear()
    runtime.debug = True
    copy(x, x)
    assert launches[-1][7] is not None
    runtime.debug = False
    launching._DIRECT = False
    copy(x, x)
    assert launches[-1][7] is not None
    launching._DIRECT = True
    assert forms() == 1


class Seen(TorchDispatchMode):
    """Notes the operations of torch that would be launches on a GPU."""

    QUIET = ("empty", "detach", "view", "slice", "alias", "as_strided", "_to_copy", "lift_fresh", "t.default")

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(name in str(func) for name in self.QUIET):
            self.noted.append(str(func))
        return func(*args, **(kwargs or {}))


def case_sam_takes_three_launches_a_dtype(launches):
    for dtypes in ([torch.float32], [torch.float32, torch.bfloat16]):
        params = [torch.nn.Parameter(torch.randn(n, 40).to(d)) for d in dtypes for n in (3, 900, 1)]
        for p in params:
            p.grad = torch.randn_like(p)
        for kind in (SAM, ASAM):
            optimizer = kind(params, torch.optim.SGD, lr=0.1)
            for warm in (False, True):
                launches.clear()
                with Seen() as seen:
                    optimizer.first_step()
                    optimizer.restore()
                assert len(launches) == 3 * len(dtypes), len(launches)
                assert not (warm and seen.noted), seen.noted


def main():
    results = {}
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            launching._prepared.clear()
            copy_kernel.device_caches.clear()
            launches = []
            try:
                with stubbed(launches):
                    case(launches)
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
