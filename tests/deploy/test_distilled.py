"""A distilled student's graph is the plain student's: no trace of teacher and distillation."""

from pathlib import Path

import onnx
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from deploy.checks.tiny import CLASSES, tiny_cfg
from deploy.graphs import exportable
from deploy.graphs.convert import to_onnx
from deploy.load import load_student
from deploy.make_spec import make_spec
from fgd.distillation import lazy_teacher
from fgd.engine.checkpoint import TrainingCheckpointer
from fgd.engine.header import describe_run
from fgd.weights import weights_sha256
from tests.fgd.distillation.lazy_teachers import SQUARE, TINY, taught, trained


def distilled_cfg(name, folder):
    """The student's config under a wider teacher with weights of its own, or one of the table."""
    if name == "Faster R-CNN":
        kind = list(TINY)[-1]
        trained(kind, folder / "teacher.pth")
        cfg = taught(tiny_cfg(name), kind, str(folder / "teacher.pth"))
        cfg.INPUT.MAX_SIZE_TRAIN = SQUARE
        return cfg
    teacher = tiny_cfg(name)
    teacher.MODEL.FPN.OUT_CHANNELS = 24
    path = folder / "teacher.pth"
    torch.save({"model": build_model(teacher).state_dict(), "config": teacher.dump()}, path)
    cfg = tiny_cfg(name)
    cfg.MODEL.DISTILLER.STUDENT = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(path)
    cfg.MODEL.DISTILLER.LEVELS = ["p3", "p4", "p5"]
    return cfg


def train_and_save(cfg, weights, batch, folder):
    """A step of distillation, then the checkpoint of the student with `weights`."""
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with EventStorage():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    optimizer.step()
    assert any(name.startswith("loss_fgd") for name in losses)
    model.student.load_state_dict(weights)
    header = {**describe_run(cfg), "classes": CLASSES}
    TrainingCheckpointer(model, str(folder), header=header).save("model_final", iteration=0)
    return model, load_student(folder / "model_final.pth")


@pytest.mark.parametrize("name", ["RetinaNet", "Faster R-CNN"])
def test_no_trace_of_distillation(name, tiny, tmp_path, make_batch, monkeypatch):
    """The plain student of the same weights is the session's; its graph has the same bytes."""
    monkeypatch.setattr(lazy_teacher, "TEACHERS", TINY)
    plain, cfg = tiny(name), distilled_cfg(name, tmp_path)
    weights = plain.model.state_dict()
    distiller, student = train_and_save(cfg, weights, make_batch(), tmp_path)
    detector = exportable(student.model)
    spec = make_spec(student, detector)
    spec.hashes["checkpoint_sha256"] = plain.spec.hashes["checkpoint_sha256"]
    model = to_onnx(detector, spec)
    expected = onnx.load(plain.path)
    assert [node.op_type for node in model.graph.node] == [n.op_type for n in expected.graph.node]
    content = model.SerializeToString(deterministic=True)
    assert content == plain.path.read_bytes()

    # neither a tensor, nor a name, nor a word of them
    states = [distiller.distillation.state_dict(), distiller.teacher.backbone.state_dict()]
    own = {value.numpy().tobytes() for value in weights.values()}
    foreign = {x.numpy().tobytes() for state in states for x in state.values() if x.any()} - own
    foreign = [data for data in foreign if len(data) > 32]
    assert len(foreign) > 10 and not [data for data in foreign if data in content]
    held = [tensor.name for tensor in model.graph.initializer]
    names = [key for key in distiller.distillation.state_dict() if any(key in x for x in held)]
    assert names == []
    for word in (b"teacher", b"istill", b"FGD", str(tmp_path).encode(), str(Path.home()).encode()):
        assert word not in content, word

    teacher = cfg.MODEL.DISTILLER.TEACHER.WEIGHTS
    assert student.origin["teacher"] == {"weights": teacher, "sha256": weights_sha256(teacher)}
    assert student.origin["iterations"] == 1
