import pytest
import torch

from fgd.methods.fgd import tiles
from fgd.methods.fgd.tiles import Scratch, by_cell, by_channel

SHAPES = [(1, 1, 1), (3, 2, 7), (2, 4, 30), (5, 3, 2), (2, 100, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 8, 50, 10**6])
def test_tiles_cover_every_cell_of_every_image_once(shape, size, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_TILE", size)
    covered = torch.zeros(shape)
    for images, runs in tiles.tiles(covered):
        for cells in runs:
            tile = covered[images, :, cells]
            tile += 1
            # Several images only where each is whole; never larger than asked but for one column.
            assert len(tile) == 1 or len(runs) == 1
            assert tile.numel() <= max(size, shape[1])
    assert (covered == 1).all()


def test_scratch_follows_the_order_of_dimensions_and_is_used_again():
    scratch = Scratch(torch.float32)
    contiguous, last = torch.zeros(2, 3, 4), torch.zeros(2, 4, 3).transpose(1, 2)
    first = scratch.like(contiguous, "a")
    assert first.shape == (2, 3, 4) and first.stride() == contiguous.stride()
    again = scratch.like(last, "a")
    assert again.stride() == last.stride() and again.data_ptr() == first.data_ptr()
    assert scratch.like(contiguous[:1, :, :2], "a").data_ptr() == first.data_ptr()
    assert scratch.like(contiguous, "b").data_ptr() != first.data_ptr()


def test_cast_copies_only_what_has_another_dtype():
    scratch = Scratch(torch.float32)
    tile = torch.randn(2, 3, 4)
    assert scratch.cast(tile, "a") is tile
    half = scratch.cast(tile.half(), "a")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, tile.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("last", [False, True])
def test_weighted_sums(images, last):
    tile = torch.randn(images, 5, 7, dtype=torch.float64)
    if last:
        tile = tile.transpose(1, 2).contiguous().transpose(1, 2)
    channels, cells = torch.randn(images, 5).double(), torch.randn(images, 7).double()
    torch.testing.assert_close(by_cell(tile, channels), (tile * channels[:, :, None]).sum(1))
    torch.testing.assert_close(by_cell(tile, channels[0]), (tile * channels[0][:, None]).sum(1))
    torch.testing.assert_close(by_channel(tile, cells), (tile * cells[:, None]).sum(2))
