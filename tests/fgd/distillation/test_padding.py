"""A teacher that wants a square sees its square, and teaches on the student's grid."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import Backbone, build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fgd.distillation.heads import why_no_heads
from fgd.distillation.padding import Padding, cut, strides
from fgd.distillation.taps import Source, choose_sources
from fgd.distillation.teacher import FrozenTeacher
from fgd.errors import UserError
from tests.conftest import make_tiny_cfg, make_training_batch

from .lazy_teachers import SQUARE, TINY, SquareBackbone, randomize, sides

LEVELS = ["p2", "p3", "p4", "p5", "p6"]


def frozen(kind, **options):
    model = randomize(instantiate(TINY[kind].describe())).eval()
    return model, FrozenTeacher(model, "RGB", "RGB", **options)


def own_forward(model, batch):
    """Of the whole square, as Detectron2 pads it: its own code on main, by hand on v0.6."""
    images = model.preprocess_image(batch).tensor
    height, width = images.shape[-2:]
    if hasattr(Backbone, "padding_constraints"):
        assert (height, width) == (SQUARE, SQUARE)
    images = F.pad(images, (0, SQUARE - width, 0, SQUARE - height))
    with torch.no_grad():
        return images, model.backbone(images)


@pytest.mark.parametrize("kind", TINY)
def test_maps_are_those_of_the_square_cut_to_the_students_grid(kind, make_batch):
    model, teacher = frozen(kind)
    batch = make_batch()  # 64x96 and 80x64
    images, wanted = own_forward(model, batch)
    view = teacher.look(batch, (96, 96))
    assert list(view.maps) == LEVELS
    for k, (name, value) in enumerate(view.maps.items(), 2):
        cells = -(-96 // 2**k)
        assert value.shape[-2:] == (cells, cells) and value.is_contiguous()
        torch.testing.assert_close(value, wanted[name][..., :cells, :cells], atol=1e-5, rtol=0)
        assert view.outputs[name].shape[-1] == SQUARE // 2**k  # whole, for RoI heads
    with torch.no_grad():
        other = model.backbone(images[..., :96, :96])["p3"]
    difference = (other - view.maps["p3"]).norm() / view.maps["p3"].norm()
    assert 0.1 < difference < 1  # what padding as the student does would teach


@pytest.mark.parametrize("kind", TINY)
def test_roi_heads_say_what_they_say_of_the_whole_square(kind, make_batch):
    model, teacher = frozen(kind, keep=["roi_heads"])
    batch = make_batch()
    boxes = [Boxes(torch.tensor([[2.0, 3, 60, 62]])), Boxes(torch.tensor([[1.0, 9, 50, 80]]))]
    _, wanted = own_forward(model, batch)
    view = teacher.regions(teacher.look(batch, (96, 96)).outputs, boxes)
    maps = [wanted[name] for name in LEVELS[:4]]
    with torch.no_grad():
        pooled = model.roi_heads.box_pooler(maps, boxes)
    torch.testing.assert_close(view.features, pooled, atol=1e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.sampled_from([32, 64, 96, 128, 160]))
def test_the_grid_is_the_students_whatever_the_sizes(steps, square):
    """Of a student's pyramid, whose p6 and p7 are halved and rounded up."""
    student = build_model(make_tiny_cfg("RetinaNet")).backbone.eval()
    padded = tuple(32 * step for step in steps)
    backbone = SquareBackbone(square, 4, "34567")
    if max(padded) > square:
        with pytest.raises(
            UserError, match=f"square of {square} pixels, and a batch of {padded[0]}"
        ):
            Padding.of(backbone).teaching(padded)
        return
    own = Padding.of(backbone).teaching(padded)
    assert own == (square, square)
    with torch.no_grad():
        wanted = student(torch.zeros(1, 3, *padded))
        found = backbone(torch.zeros(1, 3, *own))
    for name, step in strides(backbone, None).items():
        assert cut(found[name], own, padded, step).shape[-2:] == wanted[name].shape[-2:]
    assert cut(found["p3"], own, padded).shape == cut(found["p3"], own, padded, 8).shape


def test_what_a_backbone_says_of_its_padding():
    class Saying(SquareBackbone):
        size_divisibility, padding_constraints = 32, {}

    backbone = Saying()
    assert Padding.of(backbone) == (32, 0) and Padding.of(backbone).teaching((96, 64)) == (96, 64)
    assert Padding.of(SquareBackbone()) == (1, 128)  # the misspelt key has no effect
    backbone.padding_constraints = {"size_divisibility": 48, "square_size": 100}
    assert Padding.of(backbone).teaching((96, 64)) == (144, 144)  # as Detectron2 rounds it up
    backbone.padding_constraints = {"square_size": 0}
    assert Padding.of(backbone).size((33, 64)) == (64, 64)


def test_levels_without_a_stride_and_stages():
    backbone = build_model(make_tiny_cfg("RetinaNet")).backbone
    sources = {"p3": Source("p4"), "x": Source("res5", stage=True)}
    assert strides(backbone, sources) == {"p3": 16, "x": 32}
    level = torch.arange(16.0).view(1, 1, 4, 4)
    assert cut(level, (64, 64), (40, 20)).shape == (1, 1, 3, 2)


def student_cfg(size=SQUARE):
    cfg = make_tiny_cfg("GeneralizedRCNN")
    cfg.INPUT.MAX_SIZE_TRAIN = size
    return cfg


def test_larger_batches_are_refused_before_the_first_and_at_each(distilled_by):
    with pytest.raises(
        UserError, match="^INPUT.MAX_SIZE_TRAIN 129: .* square of 128 pixels, .*128"
    ):
        build_model(distilled_by("square", student_cfg(129)))
    cfg = student_cfg(1333)
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)  # as large as they are
    model = build_model(distilled_by("square", cfg)).train()
    with EventStorage():
        assert model(make_training_batch([(120, 128), (64, 64)]))
        with pytest.raises(
            UserError,
            match="square of 128 pixels, and a batch of 96x160 does not fit into it; set INPUT.",
        ):
            model(make_training_batch([(96, 136), (64, 64)]))


def test_a_dense_head_with_other_cells_is_refused():
    sides_ = [build_model(make_tiny_cfg("RetinaNet")) for _ in range(2)]
    assert why_no_heads(*sides_) == ""
    sides_[1].backbone = SquareBackbone(levels="34567")
    assert why_no_heads(*sides_).startswith("the teacher pads its images to a square of 128 pixels")
    sides_[0].backbone = SquareBackbone(levels="34567")
    assert why_no_heads(*sides_) == ""


@pytest.mark.parametrize("kind", TINY)
def test_layer_normalised_levels_are_taken_as_heads_read_them(kind, make_batch):
    model, _ = frozen(kind)
    student = build_model(make_tiny_cfg("GeneralizedRCNN")).backbone
    partners = {name: name for name in LEVELS[:4]}
    for features in ("auto", "output"):
        _, sources = choose_sources(features, student, model.backbone, partners)
        assert [str(x) for x in sources.values()] == LEVELS[:4]
    _, sources = choose_sources("pre_norm", student, model.backbone, partners)
    teacher = FrozenTeacher(model, "RGB", "RGB", sources=sources)
    batch = make_batch()
    view = teacher.look(batch, sides(batch))
    for level, source in sources.items():
        assert source.norm and str(source) == f"{level} before {source.norm}"
        norm = model.backbone.get_submodule(source.norm)
        with torch.no_grad():
            after = norm(view.maps[level])
        cells = after.shape[-1]
        wanted = view.outputs[level][..., :cells, :cells]
        torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(view.maps[level], wanted, atol=0.1)
