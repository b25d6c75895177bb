"""Solvers: how the codes of a weight are chosen once its scheme is known."""
