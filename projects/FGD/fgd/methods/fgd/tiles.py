"""Walking over feature maps in tiles that stay in a processor's cache. Used by `sweep`.

A tile is a (B, C, T) view: all channels of T cells of B images.
"""

from typing import Dict, Iterator, List, Tuple

import torch
from torch import Tensor

# Elements of a tile. On a CPU it and its temporaries stay in the cache (1 MiB each in float32;
# half and twice of it are slower); on a GPU it fills the device and is still small beside a map.
_CPU_TILE, _GPU_TILE = 2**18, 2**21


def tiles(flat_map: Tensor) -> Iterator[Tuple[slice, List[slice]]]:
    """(N, C, P) → slices of images, each with its slices of cells.

    One image at a time in many runs of cells, or several images of a small map at once.
    """
    n, channels, cells = flat_map.shape
    size = _GPU_TILE if flat_map.is_cuda else _CPU_TILE
    images = max(size // (channels * cells), 1)
    length = max(size // channels, 1)
    runs = [slice(start, min(start + length, cells)) for start in range(0, cells, length)]
    for start in range(0, n, images):
        yield slice(start, min(start + images, n)), runs


class Scratch:
    """Memory for the temporaries of a tile, used again for the next one.

    New memory would cost more than the operation that fills it: large blocks go back to the
    system when they are freed, and every page that comes back is a page fault.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._blocks: Dict[str, Tensor] = {}

    def like(self, tile: Tensor, name: str) -> Tensor:
        """Uninitialised (B, C, T) in the tile's order of dimensions; one per name at a time."""
        size = tile.numel()
        block = self._blocks.get(name)
        if block is None or block.numel() < size:
            block = self._blocks[name] = tile.new_empty(size, dtype=self.dtype)
        images, channels, cells = tile.shape
        if tile.stride(1) == 1:  # channels_last
            return block[:size].view(images, cells, channels).transpose(1, 2)
        return block[:size].view(images, channels, cells)

    def cast(self, tile: Tensor, name: str) -> Tensor:
        """The tile itself if it has the dtype already, else a converted copy."""
        if tile.dtype == self.dtype:
            return tile
        return self.like(tile, name).copy_(tile)


def by_cell(tile: Tensor, weights: Tensor) -> Tensor:
    """(B, C, T) tile, (C,) or (B, C) weights → (B, T) weighted sums over channels."""
    if len(tile) == 1:  # a matrix-vector product is many times faster than a batched one
        return torch.mv(tile[0].t(), weights.reshape(-1))[None]
    return torch.matmul(weights.reshape(-1, 1, tile.shape[1]), tile)[:, 0]


def by_channel(tile: Tensor, weights: Tensor) -> Tensor:
    """(B, C, T) tile, (B, T) weights → (B, C) weighted sums over cells."""
    if len(tile) == 1:
        return torch.mv(tile[0], weights[0])[None]
    return torch.matmul(tile, weights[:, :, None])[:, :, 0]
