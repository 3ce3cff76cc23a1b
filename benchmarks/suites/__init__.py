"""The suites: each yields its cases for a device; ``python -m benchmarks`` runs them."""
