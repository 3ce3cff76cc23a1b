"""Benchmarks, run from a clone after ``pip install -e .``: ``python -m benchmarks``, ``.report``, ``.cpu``, ..."""

import sys

try:
    import wcr_fast.kernels  # noqa: F401
except ImportError:
    print("benchmarks need the package installed in place: pip install -e .", file=sys.stderr)
    raise SystemExit(3) from None
