"""SAM and its kin on 2 gloo ranks against one process: see perturbed_checks.py for the checks."""

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

import perturbed_checks as checks


def test_ranks_equal_one_process(tmp_path):
    torch.multiprocessing.spawn(checks.work, (2, str(tmp_path)), nprocs=2)
    faults = []
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert set(found) == {check.__name__ for check in checks.CHECKS}
        for name, figures in found.items():
            if isinstance(figures, str):
                faults.append(f"rank {rank}, {name}: {figures}")
                continue
            for key, difference in (figures if isinstance(figures, dict) else {"": figures}).items():
                if not difference <= 1e-11:  # float64, sums grouped otherwise
                    faults.append(f"rank {rank}, {name} {key}: {difference}")
    assert not faults, "\n".join(faults)
