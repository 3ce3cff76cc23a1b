"""Every op in plain torch and numpy: the CPU's implementation, and the fallback without Triton."""
