"""Magnitude pruning: thresholds, masks, records, curves, checkpoints."""
