"""Benchmarks run alone: pytest-benchmark refuses to time beside xdist's other processes."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    config.option.numprocesses = 0
