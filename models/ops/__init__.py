"""Numerics with no model in them: NF4, grouped matmul, attention, cross-entropy."""
