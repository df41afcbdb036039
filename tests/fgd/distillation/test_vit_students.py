"""Students over vision transformers, under teachers over larger ones."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgd.config import check_config
from fgd.distillation.padding import Padding, check_padding, cut
from fgd.distillation.teacher import FrozenTeacher
from fgd.engine.solver import build_optimizer
from fgd.errors import UserError
from tests.conftest import make_tiny_cfg
from tests.fgd.training import taught_by_timm
from tests.tiny_vit import SQUARE, vit_cfg

from .lazy_teachers import TINY

BODY = "backbone.bottom_up."


def taught_by_vit(folder, cfg):
    """Under a Faster R-CNN over timm's test_vit, by its yaml."""
    teacher = vit_cfg(name="test_vit")
    torch.save({"model": build_model(teacher).state_dict()}, folder / "teacher.pth")
    (folder / "teacher.yaml").write_text(teacher.dump())
    cfg.MODEL.DISTILLER.STUDENT, cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN", "Distiller"
    cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE = str(folder / "teacher.yaml")
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(folder / "teacher.pth")
    return cfg


def gradients(terms, model):
    """Names of the student's backbone that the sum of the terms has a gradient for."""
    named = list(model.student.named_parameters())
    found = torch.autograd.grad(
        sum(terms), [p for _, p in named], retain_graph=True, allow_unused=True
    )
    reached = [name for (name, _), x in zip(named, found, strict=True) if x is not None and x.any()]
    return {name for name in reached if name.startswith("backbone.")}


# "lazy:vitdet" is of Detectron2's main branch, whose classes v0.6 lacks.
KINDS = ["yaml", *(kind for kind in ("square", "vitdet") if kind in TINY)]


@pytest.mark.parametrize("method, kind", [(m, k) for m in ("FGD", "PKD") for k in KINDS])
def test_a_detector_teaches_every_layer(method, kind, distilled_by, make_batch, tmp_path):
    cfg = vit_cfg()
    cfg = taught_by_vit(tmp_path, cfg) if kind == "yaml" else distilled_by(kind, cfg)
    train(cfg, method, make_batch, names=["p2", "p3", "p4", "p5"])


def test_a_network_of_timm_teaches_the_tokens(make_batch, tmp_path):
    cfg = taught_by_timm(vit_cfg(), tmp_path)
    cfg.MODEL.DISTILLER.LEVELS = []
    model, reached = train(cfg, "DSI", make_batch, names=["tokens"])
    assert all(name.startswith(BODY) for name in reached)


def train(cfg, method, make_batch, names):
    """Three steps; the losses are finite and distillation reaches the whole transformer."""
    cfg.MODEL.DISTILLER.METHOD, cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR = method, "AdamW", 1e-3
    cfg.SOLVER.LAYER_DECAY = 0.7
    check_config(cfg)
    model = build_model(cfg).train()
    assert list(model.sources) == names
    optimizer = build_optimizer(cfg, model)
    before = {k: p.detach().clone() for k, p in model.student.named_parameters()}
    for step in range(3):
        with EventStorage():
            losses = model(make_batch(seed=step))
        assert all(torch.isfinite(x) for x in losses.values())
        terms = [x for name, x in losses.items() if name.startswith(f"loss_{method.lower()}_")]
        reached = gradients(terms, model)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    transformer = {k for k in before if k.startswith(BODY)}
    assert transformer <= reached and all(x.item() > 0 for x in terms)
    after = dict(model.student.named_parameters())
    assert [k for k in transformer if torch.equal(before[k], after[k])] == []
    return model, reached


def test_a_student_of_another_kind_learns_from_the_whole_square(make_batch, tmp_path):
    cfg = taught_by_vit(tmp_path, make_tiny_cfg("GeneralizedRCNN"))
    model = build_model(cfg).train()
    batch = make_batch()  # 64x96 and 80x64, which this student pads to 96x96
    view = model.teacher.look(batch, (96, 96))
    images = torch.stack([model.teacher._normalize(x["image"], (SQUARE, SQUARE)) for x in batch])
    with torch.no_grad():
        whole = model.teacher.backbone(images)
    for level in ("p2", "p3", "p4", "p5"):
        wanted = cut(whole[level], (SQUARE, SQUARE), (96, 96))
        torch.testing.assert_close(view.maps[level], wanted, rtol=0, atol=1e-5)
    with EventStorage():
        assert all(torch.isfinite(x) for x in model(batch).values())
    cfg.INPUT.MAX_SIZE_TRAIN = 160
    with pytest.raises(UserError, match="^INPUT.MAX_SIZE_TRAIN 160: .* a square of 128 pixels"):
        build_model(cfg)


def test_what_is_said_of_its_padding_and_squares_that_do_not_fit():
    small, large = build_model(vit_cfg()), vit_cfg(name="test_vit")
    large.MODEL.VIT.SQUARE = 2 * SQUARE
    large = build_model(large)
    assert Padding.of(small.backbone) == (SQUARE, SQUARE)
    assert Padding.of(small.backbone).teaching((64, 96)) == (SQUARE, SQUARE)
    check_padding(vit_cfg(), small.backbone, large.backbone)
    with pytest.raises(UserError, match="MODEL.VIT.SQUARE 256: .* square of 128 pix.* it to 128"):
        check_padding(vit_cfg(), large.backbone, small.backbone)
    teacher = FrozenTeacher(large, "BGR", "BGR")
    assert teacher.look([{"image": torch.zeros(3, 50, 60)}], (SQUARE, SQUARE)).maps["p5"].shape[
        -2:
    ] == (4, 4)
