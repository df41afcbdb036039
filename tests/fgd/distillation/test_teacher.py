import pytest
import torch
from detectron2.modeling import build_model

from fgd.distillation.teacher import FrozenTeacher, build_teacher, teacher_config
from fgd.errors import UserError


@pytest.fixture
def teacher_file(tiny_cfg, tmp_path):
    """A teacher's config and weights as files; returns a student's config that names them."""
    cfg = tiny_cfg("RetinaNet", channels=24)
    torch.manual_seed(5)
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    student = tiny_cfg("RetinaNet")
    student.MODEL.DISTILLER.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.yaml")
    student.MODEL.DISTILLER.TEACHER.WEIGHTS = str(tmp_path / "teacher.pth")
    return student


def test_weights_are_loaded_completely(teacher_file):
    model, cfg = build_teacher(teacher_file)
    state = torch.load(teacher_file.MODEL.DISTILLER.TEACHER.WEIGHTS, weights_only=True)["model"]
    assert cfg.MODEL.FPN.OUT_CHANNELS == 24
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


@pytest.mark.parametrize("fault", ["missing", "mismatched", "nonfinite", "empty"])
def test_incomplete_weights_stop(teacher_file, tmp_path, fault):
    path = teacher_file.MODEL.DISTILLER.TEACHER.WEIGHTS
    state = torch.load(path, weights_only=True)["model"]
    name = "head.cls_score.bias"
    if fault == "missing":
        del state[name]
    elif fault == "mismatched":
        state[name] = state[name][:-1]
    elif fault == "nonfinite":
        state[name][0] = float("nan")
    elif fault == "empty":
        state = {}
    torch.save({"model": state}, path)
    with pytest.raises(UserError, match="teacher" if fault == "empty" else name):
        build_teacher(teacher_file)
    teacher_file.MODEL.DISTILLER.TEACHER.ALLOW_PARTIAL_WEIGHTS = True
    if fault == "missing":
        build_teacher(teacher_file)


def test_config_from_the_checkpoint(teacher_file, tmp_path):
    node = teacher_file.MODEL.DISTILLER.TEACHER
    content = torch.load(node.WEIGHTS, weights_only=True)
    torch.save({**content, "config": open(node.CONFIG_FILE).read()}, node.WEIGHTS)
    node.CONFIG_FILE = ""
    assert teacher_config(teacher_file).MODEL.FPN.OUT_CHANNELS == 24
    torch.save(content, node.WEIGHTS)
    with pytest.raises(UserError, match="holds no config"):
        teacher_config(teacher_file)


def test_frozen_and_equal_to_the_detectors_own_features(tiny_cfg, make_batch):
    cfg = tiny_cfg("RetinaNet")
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
    model = build_model(cfg).eval()
    batch = make_batch()
    images = model.preprocess_image(batch)
    with torch.no_grad():
        wanted = model.backbone(images.tensor)
    model.train()
    teacher = FrozenTeacher(model, "BGR", "BGR")
    features = teacher.look(batch, images.tensor.shape[-2:]).maps
    for name, value in wanted.items():
        torch.testing.assert_close(features[name], value, rtol=0, atol=0)
        assert not features[name].requires_grad
    assert not any(p.requires_grad for p in teacher.backbone.parameters())
    assert not any(m.training for m in teacher.backbone.modules())

    flipped = [{**x, "image": x["image"].flip(0)} for x in batch]
    again = FrozenTeacher(model, "RGB", "BGR").look(flipped, images.tensor.shape[-2:]).maps
    torch.testing.assert_close(again["p3"], wanted["p3"], rtol=0, atol=0)


def relative_error(actual, wanted):
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_precision_and_layout_are_the_config_keys_alone(teacher_file, make_batch):
    batch, size = make_batch(), (96, 96)

    def features(*options, autocast=None):
        model, _ = build_teacher(teacher_file)
        teacher = FrozenTeacher(model, "BGR", "BGR", *options)
        inputs = []
        teacher.backbone.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            maps = teacher.look(batch, size).maps
        assert inputs[0].dtype == torch.float32  # normalised before autocast
        last = inputs[0].is_contiguous(memory_format=torch.channels_last)
        assert last == (len(options) == 2 and options[1])
        assert all(value.is_contiguous() for value in maps.values())
        assert all(buffer.dtype == torch.float32 for buffer in teacher.backbone.parameters())
        return maps

    exact = features()
    for name, value in features(autocast=torch.bfloat16).items():  # a trainer's autocast
        assert value.dtype == torch.float32 and torch.equal(value, exact[name])
    for name, value in features("float32", True).items():
        assert value.dtype == torch.float32 and relative_error(value, exact[name]) < 1e-5
    for options in (("bfloat16", False), ("bfloat16", True)):
        for name, value in features(*options).items():
            assert value.dtype == torch.bfloat16
            assert 1e-5 < relative_error(value, exact[name]) < 0.05


def test_refuses_a_format_that_is_not_a_permutation(tiny_cfg):
    model = build_model(tiny_cfg())
    with pytest.raises(UserError, match="'L'.*'BGR'"):
        FrozenTeacher(model, "L", "BGR")
