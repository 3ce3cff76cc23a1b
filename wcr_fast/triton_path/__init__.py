"""Every op on Triton kernels: tables and scratch around the launchers of ``wcr_fast.kernels``."""
