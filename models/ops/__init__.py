"""Numerics with no model in them: 4-bit weights, grouped matmul, attention, cross-entropy."""
