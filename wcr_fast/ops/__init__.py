"""The ops: checks, backend choice, allocation, registration with torch.library, autograd."""
