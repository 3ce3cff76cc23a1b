"""Experiments: data, models, one training loop, evaluation."""
