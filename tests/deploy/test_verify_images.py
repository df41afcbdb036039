from dataclasses import replace

import numpy as np
import pytest

from deploy.checks.verify_images import draw_scene, verification_batches

from .test_spec import _spec


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_every_kind_of_batch_is_there(dtype):
    batches = verification_batches(_spec(input_dtype=dtype))  # canvas 96 x 128
    assert {len(batch.images) for batch in batches} == {1, 3}
    assert all(batch.images.shape[1:] == (3, 96, 128) for batch in batches)
    assert all(batch.images.dtype == dtype for batch in batches)
    sizes = np.concatenate([batch.image_sizes for batch in batches])
    assert sizes.dtype == np.int32 and (sizes <= (96, 128)).all()
    ratios = sizes[:, 1] / sizes[:, 0]
    assert ratios.min() < 1 < ratios.max() and sizes[0].tolist() == [96, 128]
    assert [32, 32] in sizes.tolist()
    ragged = [batch for batch in batches if len(np.unique(batch.image_sizes, axis=0)) == 3]
    assert ragged or any(len(np.unique(b.image_sizes, axis=0)) > 1 for b in batches)
    assert any(np.unique(batch.images).tolist() == [*range(112, 117)] for batch in batches)  # blank


def test_fixed_batch_and_open_canvas():
    assert all(len(b.images) == 1 for b in verification_batches(_spec(dynamic="none")))
    spec = replace(_spec(), dynamic="image", height=None, width=None)
    shapes = {batch.images.shape[2:] for batch in verification_batches(spec)}
    assert len(shapes) >= 3 and all(h % 32 == 0 == w % 32 for h, w in shapes)


def test_padding_is_noise_and_the_image_untouched():
    image = np.full((40, 50, 3), 7, np.uint8)
    batch = verification_batches(_spec(), [image])[
        5
    ]  # after four drawn ones and the almost blank one
    assert (batch.images[0, :, :40, :50] == 7).all()
    assert batch.images[0, :, 40:].std() > 50 and batch.image_sizes.tolist() == [[40, 50]]


def test_drawn_scenes_are_reproducible_and_not_flat():
    scenes = [draw_scene(np.random.default_rng(3), (60, 80)) for _ in range(2)]
    np.testing.assert_array_equal(*scenes)
    assert scenes[0].shape == (60, 80, 3) and scenes[0].dtype == np.uint8
    assert scenes[0].std() > 20
