"""Differentiable architecture search with frozen random features (RF-DARTS, RF-PCDARTS)."""

__version__ = "0.1.0"
