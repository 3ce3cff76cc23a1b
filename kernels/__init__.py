"""Triton kernels and their launchers: bytes in, numbers out. They know nothing of modules."""
