import copy

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from fgd.config import student_config
from fgd.distillation import distiller
from fgd.errors import UserError
from tests.fgd.training import distilled

ZERO = {f"{t}_WEIGHT": 0.0 for t in ("FOREGROUND", "BACKGROUND", "ATTENTION", "RELATION")}


@pytest.fixture
def distiller_cfg(tiny_cfg, tmp_path):
    """Factory of a Distiller config whose teacher is a saved tiny detector of other channels."""

    def make(arch="RetinaNet", teacher_channels=24, teacher_arch=""):
        torch.manual_seed(5)
        return distilled(tiny_cfg(arch), tmp_path, teacher_arch, teacher_channels)

    return make


def build(cfg, seed=0):
    torch.manual_seed(seed)
    return build_model(cfg)


def train_step(model, batch):
    with EventStorage():
        return model(copy.deepcopy(batch))


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_training_adds_the_four_terms_and_trains_the_student(arch, distiller_cfg, make_batch):
    model = build(distiller_cfg(arch))
    losses = train_step(model, make_batch())
    terms = {k for k in losses if k.startswith("loss_fgd_")}
    assert len(terms) == 4 and len(losses) > 4
    assert all(losses[k].isfinite() and losses[k] >= 0 for k in losses)
    levels = (
        ["p2", "p3", "p4", "p5"] if arch == "GeneralizedRCNN" else [f"p{i}" for i in range(3, 8)]
    )
    assert list(model.table) == levels and not model.table["p4"]["fgd_relation"].requires_grad
    sum(losses[k] for k in terms).backward()
    body = next(model.student.backbone.bottom_up.parameters())
    assert body.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.distillation.parameters())


def test_the_teacher_is_nowhere(distiller_cfg, make_batch):
    model = build(distiller_cfg())
    frozen = copy.deepcopy(model.teacher.backbone.state_dict())
    owned = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not owned & {id(t) for t in model.teacher.backbone.state_dict(keep_vars=True).values()}
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "distillation"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        sum(train_step(model, make_batch()).values()).backward()
        optimizer.step()
    assert not any(m.training for m in model.teacher.backbone.modules())
    for name, value in model.teacher.backbone.state_dict().items():
        torch.testing.assert_close(value, frozen[name], rtol=0, atol=0)


def run(model, batch, steps=3):
    """A few optimisation steps; returns losses and the final student state."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    history = []
    for _ in range(steps):
        losses = train_step(model, batch)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 35.0)
        optimizer.step()
        history.append(total.item())
    return history, getattr(model, "student", model).state_dict()


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_all_weights_zero_is_bit_identical_to_the_plain_student(arch, distiller_cfg, make_batch):
    cfg = distiller_cfg(arch)
    cfg.MODEL.DISTILLER.FGD.update(ZERO)
    distilled, plain = build(cfg), build(student_config(cfg))
    history, state = run(distilled, make_batch())
    wanted_history, wanted = run(plain, make_batch())
    assert history == wanted_history
    assert state.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(state[name], wanted[name]), name
    cfg.MODEL.DISTILLER.FGD.FOREGROUND_WEIGHT = 1.0
    assert run(build(cfg), make_batch())[0] != history  # the comparison can fail


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_inference_is_the_students(arch, distiller_cfg, make_batch):
    model = build(distiller_cfg(arch)).eval()
    inputs = [{"image": x["image"]} for x in make_batch()]
    with torch.no_grad():
        actual, wanted = model(inputs), model.student(inputs)
    for a, w in zip(actual, wanted, strict=True):
        a, w = a["instances"], w["instances"]
        assert torch.equal(a.pred_boxes.tensor, w.pred_boxes.tensor)
        assert torch.equal(a.scores, w.scores)


def test_inherits_once_after_initialisation(distiller_cfg):
    cfg = distiller_cfg(teacher_channels=16)
    cfg.MODEL.DISTILLER.INHERIT = True
    model = build(cfg)
    teacher = model.teacher.backbone.state_dict()
    student = model.student.backbone
    assert not torch.equal(student.fpn_output3.weight, teacher["fpn_output3.weight"])
    bottom_up = copy.deepcopy(student.bottom_up.state_dict())
    model.inherit_from_teacher()
    assert torch.equal(student.fpn_output3.weight, teacher["fpn_output3.weight"])
    for name, value in student.bottom_up.state_dict().items():
        assert torch.equal(value, bottom_up[name])
    student.fpn_output3.weight.data.zero_()
    model.inherit_from_teacher()
    assert student.fpn_output3.weight.abs().max() == 0


def test_without_a_method_the_student_only_inherits(distiller_cfg, make_batch):
    cfg = distiller_cfg(teacher_channels=16)
    cfg.MODEL.DISTILLER.update(METHOD="", INHERIT=True)
    model = build(cfg)
    model.inherit_from_teacher()
    assert set(train_step(model, make_batch())) == {"loss_cls", "loss_box_reg"}
    assert {name.split(".")[0] for name in model.state_dict()} == {"student"}
    assert "Distillation is OFF" in model.describe()


def test_other_families_share_the_levels_they_have(distiller_cfg, make_batch):
    cfg = distiller_cfg("RetinaNet", teacher_arch="GeneralizedRCNN")
    with pytest.raises(UserError, match="(?s)no level of stride 128 for 'p7'.*'p6'.*p2 "):
        build(cfg)
    cfg.MODEL.DISTILLER.LEVELS = ["p3", "p4", "p5"]
    model = build(cfg)
    assert train_step(model, make_batch())["loss_fgd_foreground"] > 0
    assert "Distillation is ON: FGD on p3, p4, p5" in model.describe()
    assert "teacher GeneralizedRCNN" in model.describe()


def test_teacher_options_reach_the_teacher_and_the_terms_stay_close(distiller_cfg, make_batch):
    cfg = distiller_cfg()
    exact = train_step(build(cfg), make_batch())
    cfg.MODEL.DISTILLER.TEACHER.update(PRECISION="bfloat16", CHANNELS_LAST=True)
    model = build(cfg)
    assert model.teacher.layout == torch.channels_last
    assert "in bfloat16" in model.describe()
    rough = train_step(model, make_batch())
    for name, value in exact.items():
        if name.startswith("loss_fgd_"):
            assert rough[name].dtype == torch.float32 and rough[name] != value
            # An untrained teacher's attention hangs on few cells, so rounding shows more.
            assert rough[name].item() == pytest.approx(value.item(), rel=0.2)
        else:
            assert rough[name] == value  # the student's own losses do not notice
    sum(rough.values()).backward()


def test_padding_that_the_teacher_cannot_take_is_refused(distiller_cfg, tiny_cfg):
    cfg = distiller_cfg("RetinaNet")  # the teacher needs multiples of 32
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.TIMM.TOP_BLOCK = ["res3", "res4"], "none"
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16]]
    with pytest.raises(
        UserError, match="multiples of 16 pixels, the teacher needs multiples of 32"
    ):
        build(cfg)


def pair(tmp_path, student, teacher):
    """Config of a Distiller for two whole configs; the teacher gets random weights in a file."""
    torch.manual_seed(5)
    torch.save({"model": build_model(teacher).state_dict()}, tmp_path / "teacher.pth")
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    cfg = student.clone()
    cfg.MODEL.DISTILLER.STUDENT = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.yaml")
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(tmp_path / "teacher.pth")
    return cfg


def fcos(tiny_cfg, channels):
    cfg = tiny_cfg("RetinaNet", channels=channels)
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    cfg.MODEL.FCOS.NUM_CLASSES, cfg.MODEL.FCOS.NUM_CONVS = 3, 1
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [120.0, 115.0, 100.0], [58.0, 57.0, 55.0]
    return cfg


def cascade_mask(tiny_cfg, channels):
    cfg = tiny_cfg("GeneralizedRCNN", channels=channels)
    cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NAME = True, "CascadeROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    return cfg


def reppoints(tiny_cfg):
    cfg = tiny_cfg("RetinaNet")
    cfg.MODEL.META_ARCHITECTURE = "RepPoints"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.NORM = "build_reppoints_timm_fpn_backbone", "GN"
    cfg.MODEL.REPPOINTS.NUM_CLASSES, cfg.MODEL.REPPOINTS.NUM_CONVS = 3, 1
    return cfg


PAIRS = {
    "RepPoints-FCOS": lambda make: (reppoints(make), fcos(make, 24), {}),
    "RetinaNet-FCOS": lambda make: (make("RetinaNet"), fcos(make, 24), {}),
    "FCOS-RetinaNet": lambda make: (fcos(make, 16), make("RetinaNet", channels=24), {}),
    "Faster-CascadeMask": lambda make: (make("GeneralizedRCNN"), cascade_mask(make, 24), {}),
    "Faster-RetinaNet": lambda make: (
        make("GeneralizedRCNN"),
        make("RetinaNet", channels=24),
        {"LEVELS": ["p3", "p5"], "LEVEL_MAP": ["p5:p5"]},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_any_pair_distils_what_each_side_would_see_alone(name, tiny_cfg, tmp_path, make_batch):
    student, teacher, node = PAIRS[name](tiny_cfg)
    cfg = pair(tmp_path, student, teacher)
    cfg.MODEL.DISTILLER.update(node)
    model, seen = build(cfg), []
    model.distillation.register_forward_pre_hook(lambda module, args: seen.append(args))
    losses = train_step(model, make_batch())
    assert all(v.isfinite() for v in losses.values()) and losses["loss_fgd_foreground"] > 0
    given, batch = seen[0][0], make_batch()
    own, taught, padded = given.student, given.teacher, given.padded_size
    for instances, sample in zip(given.instances, batch, strict=True):
        assert torch.equal(instances.gt_boxes.tensor, sample["instances"].gt_boxes.tensor)
        assert torch.equal(instances.gt_classes, sample["instances"].gt_classes)
    assert given.image_sizes == [x["image"].shape[-2:] for x in batch]
    # The teacher's features are those of its own inference on its own kind of image.
    alone = build_model(teacher).eval()
    alone.load_state_dict(torch.load(tmp_path / "teacher.pth", weights_only=True)["model"])
    if teacher.INPUT.FORMAT != student.INPUT.FORMAT:
        batch = [{**x, "image": x["image"].flip(0)} for x in batch]
    with torch.no_grad():
        wanted = alone.backbone(alone.preprocess_image(batch).tensor)
    assert list(own) == list(taught) == list(model.distillation.levels)
    for level, value in taught.items():
        assert torch.equal(value, wanted[level]) and value.shape[1] == 24
        assert own[level].shape == (2, 16, *value.shape[2:]) and own[level].requires_grad
    assert padded == alone.preprocess_image(batch).tensor.shape[-2:]


def test_levels_may_have_other_names_in_the_teacher(distiller_cfg, make_batch):
    plain = build(distiller_cfg())
    wanted = train_step(plain, make_batch())
    cfg = distiller_cfg()
    cfg.MODEL.DISTILLER.LEVEL_MAP = ["p3:p3", "p6:p6"]
    assert train_step(build(cfg), make_batch()) == wanted
    cfg.MODEL.DISTILLER.LEVEL_MAP = ["p3:p4"]
    with pytest.raises(UserError, match="'p3' has stride 8, the teacher's 'p4' 16"):
        build(cfg)


def test_unequal_grids_after_padding_name_both(distiller_cfg, make_batch):
    model = build(distiller_cfg())
    look = model.teacher.look

    def cropped(*args):
        view = look(*args)
        maps = {k: v[..., :-1] if k == "p4" else v for k, v in view.maps.items()}
        return view._replace(maps=maps)

    model.teacher.look = cropped
    with pytest.raises(UserError) as error:
        train_step(model, make_batch())
    text = str(error.value)
    assert "cannot distil 'p4': in a batch padded to 96x96 pixels the student's 'p4'" in text
    assert "has a grid of 6x6 cells, the teacher's 'p4' one of 6x5" in text


def test_group_normalised_necks_are_distilled_before_the_norm(tiny_cfg, tmp_path, make_batch):
    student, teacher = tiny_cfg(channels=32), tiny_cfg(channels=64)
    student.MODEL.FPN.NORM = "GN"
    cfg = pair(tmp_path, student, teacher)

    def distilled_losses(kind):
        cfg.MODEL.DISTILLER.FEATURES = kind
        model, seen = build(cfg), []
        model.distillation.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        losses = train_step(model, make_batch())
        backbone = model.student.backbone
        wanted = backbone(model.student.preprocess_image(make_batch()).tensor)["p4"]
        own = seen[0].student["p4"]
        torch.testing.assert_close(
            own if kind == "output" else backbone.fpn_output4.norm(own), wanted
        )
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        return losses

    losses = {kind: distilled_losses(kind) for kind in ("auto", "pre_norm", "output")}
    assert losses["auto"] == losses["pre_norm"] != losses["output"]
    cfg.MODEL.DISTILLER.FEATURES = "pre_norm"
    cfg.MODEL.FPN.NORM = ""
    with pytest.raises(UserError, match="no distilled level of student or teacher ends in a norm"):
        build(cfg)


def step_at(model, batch, iteration):
    with EventStorage(iteration):
        return model(copy.deepcopy(batch))


def test_the_schedule_scales_every_term_and_nothing_else(distiller_cfg, make_batch):
    cfg = distiller_cfg()
    whole = step_at(build(cfg), make_batch(), 5)
    cfg.MODEL.DISTILLER.FACTOR = 0.5
    cfg.MODEL.DISTILLER.SCHEDULE.update(START=4, WARMUP_ITERS=4)
    model = build(cfg)
    half = step_at(model, make_batch(), 5)
    assert model.factor == 0.25 and "factor 0.5, from iteration 4 on" in model.describe()
    for name, value in whole.items():
        scale = 0.25 if name in model.distillation.loss_names else 1
        assert half[name].item() == pytest.approx(scale * value.item(), rel=1e-6)


def test_while_the_factor_is_zero_the_teacher_rests_and_the_student_is_the_plain_one(
    distiller_cfg, make_batch
):
    cfg = distiller_cfg()
    cfg.MODEL.DISTILLER.SCHEDULE.START = 1000
    model = build(cfg)

    def fail(*args):
        raise AssertionError("the teacher ran")

    look, model.teacher.look = model.teacher.look, fail
    losses = step_at(model, make_batch(), 999)
    names = model.distillation.loss_names
    assert len(names) == 4 and all(losses[name] == 0 for name in names)
    assert model.factor == 0 and model.table == {}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(not p.grad.any() for p in model.distillation.parameters())
    with pytest.raises(RuntimeError, match="features were taken"):
        model._tap.pop()
    model.teacher.look = look
    on = step_at(model, make_batch(), 1000)
    assert on.keys() == losses.keys() and on["loss_fgd_background"] > 0
    history, state = run(build(cfg), make_batch())
    wanted_history, wanted = run(build(student_config(cfg)), make_batch())
    assert history == wanted_history
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_ddp_reduces_when_the_factor_turns_to_zero_and_back(
    distiller_cfg, make_batch, tmp_path, monkeypatch
):
    """DistributedDataParallel fails in a step after one in which a parameter had no gradient."""
    cfg = distiller_cfg("GeneralizedRCNN")
    cfg.MODEL.DISTILLER.SCHEDULE.update(START=1, STOP=2)
    model = build(cfg)
    address = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for iteration in range(4):
            losses = step_at(parallel, make_batch(), iteration)
            assert (losses["loss_fgd_background"] > 0) == (iteration == 1)
            sum(losses.values()).backward()
        # the fault that the zeros prevent
        monkeypatch.setattr(distiller, "_zero", lambda *parts: torch.zeros(()))
        step_at(parallel, make_batch(), 4)["loss_cls"].backward()
        with pytest.raises(RuntimeError, match="did not receive grad"):
            step_at(parallel, make_batch(), 5)
    finally:
        dist.destroy_process_group()
