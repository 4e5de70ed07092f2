"""MODIP: improve a diffusion policy by planning in a learned world model and distilling the plans."""

from modip.artifacts import Policy, load_policy

__all__ = ["Policy", "load_policy"]
