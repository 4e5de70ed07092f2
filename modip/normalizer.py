"""Affine statistics of observations, kept inside the checkpoint of whatever uses them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalizer(nn.Module):
    """x -> clip((x - mean) / std, -clip, clip), per dimension; a constant dimension keeps its unit scale.

    The clip bounds what an observation far outside the data can do to a network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, clip: float = 10.0) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", torch.where(std > 1e-6, std, torch.ones_like(std)))
        self.clip = clip

    @classmethod
    def fit(cls, data: Tensor) -> Normalizer:
        """data (N, D)."""
        return cls(data.mean(0), data.std(0))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).clamp(-self.clip, self.clip)

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean
