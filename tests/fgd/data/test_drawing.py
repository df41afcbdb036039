import numpy as np
import pytest
from pycocotools import mask as mask_util

from fgd.data.drawing import CLASSES, ShapesSettings, _outline, _overlap, draw_image
from fgd.errors import UserError

CLEAN = {"noise": 0.0, "clutter": 0, "overlap": 0.0, "contrast": 100.0}


def boxes_of(objects):
    return np.array([[*points.min(axis=0), *points.max(axis=0)] for _, points in objects])


def test_same_settings_and_index_give_the_same_pixels_whatever_was_drawn_before():
    settings = ShapesSettings(seed=3)
    first = draw_image(5, settings)
    draw_image(0, ShapesSettings(seed=9))
    again = draw_image(5, ShapesSettings(seed=3, images=50))
    np.testing.assert_array_equal(first[0], again[0])
    assert [label for label, _ in first[1]] == [label for label, _ in again[1]]
    np.testing.assert_array_equal(boxes_of(first[1]), boxes_of(again[1]))


@pytest.mark.parametrize("change", [{"seed": 4}, {"split": 1}])
def test_other_seed_or_split_gives_other_pixels(change):
    pixels, _ = draw_image(5, ShapesSettings(seed=3))
    other, _ = draw_image(5, ShapesSettings(**{"seed": 3, **change}))
    assert (pixels != other).mean() > 0.9


def test_counts_labels_sizes_and_overlaps_stay_in_their_ranges():
    settings = ShapesSettings(objects=(2, 4), classes=5, box=(18, 40), overlap=0.2, size=(96, 128))
    counts, labels, sides = set(), set(), set()
    for index in range(60):
        pixels, objects = draw_image(index, settings)
        height, width, channels = pixels.shape
        sides |= {height, width}
        assert channels == 3 and pixels.dtype == np.uint8
        counts.add(len(objects))
        labels |= {label for label, _ in objects}
        boxes = boxes_of(objects)
        sizes = boxes[:, 2:] - boxes[:, :2]
        assert sizes.min() >= 17.98 and sizes.max() <= 40.02  # vertices are rounded to 0.01
        assert boxes.min() >= 0 and (boxes[:, 2:] <= [width, height]).all()
        for i in range(len(boxes)):
            assert all(_overlap(boxes[i], boxes[j]) <= 0.202 for j in range(i))
    assert counts == {2, 3, 4} and labels == set(range(5))
    assert min(sides) >= 96 and max(sides) <= 128 and len(sides) > 10


def test_overlap_is_a_fraction_of_the_smaller_box():
    small, large = np.array([0, 0, 10, 10]), np.array([5, 0, 45, 20])
    assert _overlap(small, large) == _overlap(large, small) == 0.5
    assert _overlap(small, small + 10) == 0.0


@pytest.mark.parametrize("label", range(len(CLASSES)), ids=CLASSES)
def test_outline_fills_the_unit_square_and_has_the_area_of_its_class(label):
    x, y = _outline(label, angle=0.0).T
    np.testing.assert_allclose([x.min(), y.min(), x.max(), y.max()], [0, 0, 1, 1], atol=1e-12)
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
    # Circle pi / 4, triangle 1 / 2, square 1, five-pointed star of inner radius 0.42, and a plus of
    # arms 0.36 wide: 1 - 4 * (0.32 ** 2).
    expected = {"circle": np.pi / 4, "triangle": 0.5, "square": 1.0, "cross": 1 - 4 * 0.32**2}
    star = 5 * 0.42 * np.sin(np.pi / 5) / (2 * np.sin(0.4 * np.pi) * (1 + np.cos(np.pi / 5)))
    assert area == pytest.approx(expected.get(CLASSES[label], star), abs=5e-3)


@pytest.mark.parametrize("classes", range(1, len(CLASSES) + 1))
def test_polygon_and_box_are_where_the_pixels_are(classes):
    """Drawn pixels, rasterised COCO polygon and box have the same extent, to a pixel."""
    settings = ShapesSettings(objects=(1, 1), classes=classes, **CLEAN)
    blank = ShapesSettings(objects=(0, 0), classes=classes, **CLEAN)
    for index in range(8):
        pixels, [(_, points)] = draw_image(index, settings)
        background, nothing = draw_image(index, blank)
        assert nothing == []
        drawn = np.abs(pixels.astype(int) - background).max(axis=2) > 50  # half of the contrast
        rle = mask_util.merge(mask_util.frPyObjects([points.ravel().tolist()], 96, 96))
        mask = mask_util.decode(rle).astype(bool)
        iou = (drawn & mask).sum() / (drawn | mask).sum()
        assert iou > 0.9
        rows, columns = np.nonzero(drawn)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        # A corner thinner than half a pixel is not seen at this threshold: one pixel is allowed.
        np.testing.assert_allclose(extent, boxes_of([(0, points)])[0], atol=1.6)


def test_contrast_is_the_strongest_channels_difference():
    settings = ShapesSettings(objects=(1, 1), **{**CLEAN, "contrast": 60.0})
    blank = ShapesSettings(objects=(0, 0), **CLEAN)
    for index in range(10):
        pixels, [(_, points)] = draw_image(index, settings)
        background, _ = draw_image(index, blank)
        x0, y0 = points.min(axis=0).astype(int)
        x1, y1 = points.max(axis=0).astype(int)
        around = background[y0:y1, x0:x1].reshape(-1, 3).mean(axis=0)
        x, y = points.mean(axis=0).astype(int)
        assert np.abs(pixels[y, x] - around).max() >= 50  # 60 less the texture at the box's rim


def test_noise_and_clutter_change_pixels_only():
    plain, objects = draw_image(2, ShapesSettings(noise=0.0, clutter=0))
    noisy, same = draw_image(2, ShapesSettings(noise=20.0, clutter=0))
    np.testing.assert_array_equal(boxes_of(objects), boxes_of(same))
    spread = (noisy.astype(float) - plain)[(plain > 60) & (plain < 195)].std()
    assert spread == pytest.approx(20, abs=1)
    cluttered, same = draw_image(2, ShapesSettings(noise=0.0, clutter=8))
    np.testing.assert_array_equal(boxes_of(objects), boxes_of(same))
    assert 0.01 < (np.abs(cluttered.astype(int) - plain).max(axis=2) > 20).mean() < 0.5


def test_full_image_keeps_the_shapes_that_fit():
    settings = ShapesSettings(size=(40, 40), objects=(9, 9), box=(30, 40), overlap=0.0)
    _, objects = draw_image(0, settings)
    assert len(objects) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": 0},
        {"seed": -1},
        {"split": 2},
        {"size": (96,)},
        {"classes": 6},
        {"objects": (-1, 2)},
        {"box": (60, 18)},
        {"box": (18, 97)},
        {"rotation": -1.0},
        {"overlap": 1.5},
        {"contrast": float("nan")},
        {"texture": -1.0},
        {"noise": float("inf")},
        {"clutter": -1},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(UserError) as caught:
        ShapesSettings(**wrong)
    assert f"{name}={value} is not possible" in str(caught.value)
