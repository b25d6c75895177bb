"""Kernels: compiled forms of the numerics, and what quantized linears multiply with."""
