"""Selection among sharded weights on 1, 2 and 4 gloo ranks against one process: see selection_checks.py."""

import pytest
import torch
from conftest import CUDA, TRITON_SKIP

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

import selection_checks as checks

from benchmarks import sharded

# Per call and process, whatever the weights.
MOST_BYTES = 256_000


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_select_as_one_process(ranks, tmp_path):
    skipped = ("kernels",) if CUDA or TRITON_SKIP else ()  # compiled ones don't run on the CPU's ranks
    torch.multiprocessing.spawn(checks.work, (ranks, str(tmp_path), skipped), nprocs=ranks)
    faults = []
    for rank in range(ranks):
        for check, found in torch.load(tmp_path / f"{rank}.pt").items():
            if isinstance(found, str) or not all(sent <= MOST_BYTES for sent in found.values()):
                faults.append(f"rank {rank}, {check}: {found}")
    assert not faults, "\n".join(faults)


def test_the_benchmark_compares_and_counts(capfd):
    assert sharded.main(["--list", "tiny", "--ranks", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 3 * 2 * 4  # dtypes, cuts, scopes, calls
    assert not any("DIFFERS" in line for line in lines)
