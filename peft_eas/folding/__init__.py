"""Adapters into projection weights: pure functions on tensors, of quantised and offloaded weights, too."""
