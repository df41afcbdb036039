import pytest
import torch

from fgd.bench.cases import PYRAMIDS, draw_batch, draw_boxes, draw_maps, levels_of


@pytest.mark.parametrize(
    "pyramid, names, megabytes",
    [("retinanet", "p3 p4 p5 p6 p7", 41.5), ("rcnn", "p2 p3 p4 p5", 165.4)],
)
def test_pyramids_are_those_that_fgd_distils(pyramid, names, megabytes):
    assert [level.name for level in levels_of(pyramid, 256)] == names.split()
    maps = draw_maps(pyramid, (800, 1216), 1, 1, torch.float32, torch.device("cpu"))
    assert maps.bytes * 2 * 256 / 1e6 == pytest.approx(megabytes, abs=0.5)
    assert (
        maps.student[names.split()[0]].shape[2:]
        == {
            "retinanet": (100, 152),
            "rcnn": (200, 304),
        }[pyramid]
    )


def test_maps_are_leaves_of_the_dtype_and_repeat():
    draw = lambda: draw_maps("rcnn", (70, 90), 2, 3, torch.bfloat16, torch.device("cpu"))  # noqa: E731
    maps, again = draw(), draw()
    assert maps.student["p5"].shape == (2, 3, 3, 3)  # rounded up, as convolutions do
    assert len(PYRAMIDS["rcnn"]) == len(maps.student)
    for name, tensor in maps.student.items():
        assert tensor.requires_grad and tensor.is_leaf and tensor.dtype == torch.bfloat16
        assert not maps.teacher[name].requires_grad
        assert torch.equal(tensor, again.student[name])
        assert not torch.equal(tensor, maps.teacher[name])


def test_boxes_are_inside_and_mostly_small():
    first, second = draw_boxes(300, (800, 1216), 2)
    assert first.shape == (300, 4) and not torch.equal(first, second)
    assert torch.equal(first, draw_boxes(300, (800, 1216), 2)[0])
    for boxes in (first, second, draw_boxes(50, (16, 20), 1)[0]):
        assert boxes[:, :2].min() >= 0 and (boxes[:, 2:] > boxes[:, :2]).all()
    assert first[:, 2].max() <= 1216 + 1e-3 and first[:, 3].max() <= 800 + 1e-3
    side = (first[:, 2:] - first[:, :2]).prod(1).sqrt()
    assert 12 <= side.min() < 16 and 400 < side.max() <= 640
    assert side.median() < 150


def test_images_and_what_a_need_adds():
    plain, more = (
        draw_batch((40, 56), 2, 3, 5, needs) for needs in (set(), {"maps", "second_view"})
    )
    for one, other in zip(plain, more, strict=True):
        assert one["image"].shape == (3, 40, 56) and one["image"].dtype == torch.uint8
        assert torch.equal(one["image"], other["image"]) and 0 < one["image"].float().std()
        assert one["instances"].gt_classes.tolist() == other["instances"].gt_classes.tolist()
        assert len(one["instances"]) == 3 and one["instances"].gt_classes.max() < 5
        assert other.keys() - one.keys() == {"second_image"}
        assert not torch.equal(other["second_image"], other["image"])
    assert not torch.equal(more[0]["second_image"], more[1]["second_image"])
