"""Metrics: pure functions of logits and weights."""
