"""Spatial and channel attention of a feature map (FGD paper, A^S and A^C). Pure functions."""

from torch import Tensor


def spatial_attention(features: Tensor, temperature: float) -> Tensor:
    """(N, C, H, W) → (N, H, W), >= 0, mean 1 per image: where the map responds.

    H*W times the softmax over cells of the mean absolute response / ``temperature``. Large
    responses saturate it: one cell can reach H*W and the others exactly 0.
    """
    n, _, height, width = features.shape
    response = features.abs().mean(dim=1).flatten(1)
    return height * width * (response / temperature).softmax(dim=1).view(n, height, width)


def channel_attention(features: Tensor, temperature: float) -> Tensor:
    """(N, C, H, W) → (N, C), >= 0, mean 1 per image: which channels respond.

    C times the softmax over channels of the mean absolute response / ``temperature``.
    """
    response = features.abs().mean(dim=(2, 3))
    return features.shape[1] * (response / temperature).softmax(dim=1)
