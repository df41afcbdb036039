import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.cli import main as train_net
from fgd.config import check_config, get_fgd_cfg
from fgd.errors import UserError
from fgd.methods.nkd import (
    NKD,
    TfNKD,
    non_target_term,
    of_label,
    target_term,
    teacher_free_term,
    without_label,
)
from fgd.visualize.__main__ import main as visualize
from tests.fgd.doctor.clinic import write_config
from tests.fgd.methods.fgd.test_method import WAITING, Recorder
from tests.fgd.methods.regions import batch_of, make_regions
from tests.fgd.training import distilled, training_cfg

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "nkd").glob("*.npz"))
WEIGHTS = {"target": 1.0, "non_target": 1.5}
WEIGHTS |= {"background_target": 0.5, "background_non_target": 0.25}


def random(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def every(labels):
    return torch.ones(len(labels), dtype=torch.bool)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_golden_value_and_gradient(path, dtype, tolerance):
    content = np.load(path)
    student = torch.from_numpy(content["logits_student"]).to(dtype).requires_grad_()
    labels = torch.from_numpy(content["labels"])
    labels = labels if labels.dim() == 1 else labels.argmax(1)  # of mixed ones the largest part
    if str(content["kind"]) == "tf":
        loss = teacher_free_term(student, labels, every(labels))
    else:
        teacher = torch.from_numpy(content["logits_teacher"]).to(dtype)
        given = student, teacher, labels, every(labels)
        loss = target_term(*given)
        loss = loss + float(content["gamma"]) * non_target_term(
            *given, float(content["temperature"])
        )
    loss.backward()
    assert loss.item() == pytest.approx(content["loss"].item(), rel=tolerance)
    wanted = torch.from_numpy(content["grad_logits_student"])
    error = (student.grad.double() - wanted).abs().max()
    assert error <= tolerance * wanted.abs().max()


def test_there_are_five_golden_cases():
    assert len(GOLDEN) == 5


def test_golden_vector():
    i = torch.arange(15, dtype=torch.float64).view(3, 5)
    student, teacher = torch.sin(0.37 * i + 1) + 0.1, torch.sin(0.37 * i + 2) + 0.2
    given = student, teacher, torch.tensor([0, 3, 4]), torch.ones(3, dtype=torch.bool)
    for tau, gamma, wanted in ((1.0, 1.5, 2.4908460417559355), (3.0, 3.5, 44.06155918298344)):
        found = target_term(*given) + gamma * non_target_term(*given, tau)
        assert found.item() == pytest.approx(wanted, rel=1e-13)


def softmax(row):
    total = math.fsum(math.exp(x - max(row)) for x in row)
    return [math.exp(x - max(row)) / total for x in row]


def reference(student, teacher, labels, used, tau):
    """(L_t, L_n, teacher-free L) by the equations, row by row."""
    target = other = free = 0.0
    rows = [r for r in range(len(labels)) if used(labels[r])]
    mean = math.fsum(softmax(student[r])[labels[r]] for r in rows) / max(1, len(rows))
    for r in rows:
        y = labels[r]
        p, q = softmax(student[r])[y], softmax(teacher[r])[y]
        target -= q * math.log(p) / len(rows)
        free -= (p + 1 - mean) * math.log(p) / len(rows)
        drop = [[x / tau for k, x in enumerate(row) if k != y] for row in (student[r], teacher[r])]
        for p, q in zip(*map(softmax, drop), strict=True):
            other -= tau**2 * q * math.log(p) / len(rows)
    return target, other, free


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(-1, 4), max_size=7),
    classes=st.integers(2, 4),
    tau=st.floats(0.3, 4.0),
    seed=st.integers(0, 99),
)
def test_equals_the_literal_reference(labels, classes, tau, seed):
    labels = [min(y, classes) for y in labels]
    student, teacher = (random(len(labels), classes + 1, seed=seed + n) for n in (0, 100))
    given = torch.tensor(labels).long()
    batch = batch_of(make_regions(student, teacher, given))
    (found,) = NKD(WEIGHTS, tau)(batch).values()
    free = TfNKD([], dict.fromkeys(TfNKD.terms, 1.0))(batch)["regions"]
    sets = {"": lambda y: 0 <= y < classes, "background_": lambda y: y == classes}
    for prefix, used in sets.items():
        wanted = reference(student.tolist(), teacher.tolist(), labels, used, tau)
        for term, value in zip(("target", "non_target"), wanted):
            name = prefix + term
            assert found[name].item() == pytest.approx(WEIGHTS[name] * value, rel=1e-10, abs=1e-14)
        assert free[f"{prefix}target"].item() == pytest.approx(wanted[2], rel=1e-10, abs=1e-14)


def test_gradcheck():
    labels, teacher = torch.tensor([0, 3, 1, -1, 3]), random(5, 4, seed=1)
    method = NKD(WEIGHTS, 2.0)

    def terms(student):
        return tuple(method(batch_of(make_regions(student, teacher, labels)))["regions"].values())

    assert torch.autograd.gradcheck(terms, random(5, 4).requires_grad_())


def test_the_teacher_free_weights_have_no_gradient():
    student, labels = random(4, 5).requires_grad_(), torch.tensor([0, 2, 2, 3])
    teacher_free_term(student, labels, every(labels)).backward()
    prob = student.detach().softmax(1)
    p = prob.gather(1, labels[:, None])
    onehot = torch.eye(5, dtype=torch.float64)[labels]
    torch.testing.assert_close(student.grad, (p + 1 - p.mean()) * (prob - onehot) / 4)


def test_columns_are_taken_and_left_out():
    values = torch.arange(12.0).view(3, 4)
    labels = torch.tensor([0, 3, -1])
    assert of_label(values, labels).tolist() == [0, 7, 8]
    assert without_label(values, labels).tolist() == [[1, 2, 3], [4, 5, 6], [9, 10, 11]]


def test_hand_computed():
    """Equal logits of 3 columns: 1/3 log 3, and log 2 over the other two."""
    zeros, labels = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    (found,) = NKD(WEIGHTS, 1.0)(batch_of(make_regions(zeros, zeros, labels))).values()
    assert found["target"].item() == pytest.approx(math.log(3) / 3)
    assert found["non_target"].item() == pytest.approx(1.5 * math.log(2))
    assert found["background_target"] == found["background_non_target"] == 0
    (free,) = TfNKD([], {"target": 1.0, "background_target": 1.0})(
        batch_of(make_regions(zeros, None, labels))
    ).values()
    assert free["target"].item() == pytest.approx(math.log(3)) and free["background_target"] == 0


def test_logits_are_known_up_to_a_constant_and_rows_up_to_their_order():
    student, teacher, labels = random(6, 5), random(6, 5, seed=1), torch.tensor([0, 4, 1, -1, 3, 4])
    method = NKD(WEIGHTS, 2.0)
    exact = method(batch_of(make_regions(student, teacher, labels)))["regions"]
    shift = random(6, 1, seed=2)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    moved = make_regions((student + shift)[order], (teacher - shift)[order], labels[order])
    for name, value in method(batch_of(moved))["regions"].items():
        torch.testing.assert_close(value, exact[name])
    # Rows that are ignored may say anything.
    student[3], teacher[3] = 99.0, -99.0
    for name, value in method(batch_of(make_regions(student, teacher, labels)))["regions"].items():
        assert torch.equal(value, exact[name])


@pytest.mark.parametrize("labels", [[], [3, 3], [-1]], ids=["none", "background", "ignored"])
def test_without_an_object_the_terms_are_zero_and_connected(labels):
    student = random(len(labels), 4).requires_grad_()
    regions = make_regions(student, random(len(labels), 4), torch.tensor(labels).long())
    for method in (NKD(WEIGHTS, 1.0), TfNKD([], dict.fromkeys(TfNKD.terms, 1.0))):
        for name, value in method(batch_of(regions))["regions"].items():
            if "background" not in name or 3 not in labels:
                assert value.item() == 0
                assert torch.autograd.grad(value, student)[0].abs().sum() == 0
            else:
                assert value.item() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = ((10 * random(64, 9, seed=n)).to(dtype) for n in (0, 1))
    labels = torch.arange(64) % 9
    weights = dict.fromkeys(TfNKD.terms, 1.0)
    for method in (NKD(WEIGHTS, 2.0), TfNKD([], weights)):
        half = method(batch_of(make_regions(student, teacher, labels)))["regions"]
        sides = student.double(), teacher.double()
        exact = method(batch_of(make_regions(*sides, labels)))["regions"]
        for name, value in half.items():
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(exact[name].item(), rel=1e-5)


def test_the_host_never_waits_for_a_value():
    given = batch_of(make_regions(random(9, 5).requires_grad_(), random(9, 5), torch.arange(9) % 5))
    with Recorder() as recorder:
        for method in (NKD(WEIGHTS, 2.0), TfNKD([], dict.fromkeys(TfNKD.terms, 1.0))):
            sum(method(given)["regions"].values()).backward()
    assert "gather" in recorder.seen and not recorder.seen & WAITING


def test_config():
    node = get_fgd_cfg().MODEL.DISTILLER
    assert list(node.NKD.items()) == [
        ("TARGET_WEIGHT", 1.0),
        ("NON_TARGET_WEIGHT", 1.5),
        ("BACKGROUND_TARGET_WEIGHT", 0.0),
        ("BACKGROUND_NON_TARGET_WEIGHT", 0.0),
        ("TEMPERATURE", 1.0),
    ]
    assert dict(node.TFNKD) == {"TARGET_WEIGHT": 1.0, "BACKGROUND_TARGET_WEIGHT": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("NKD.TEMPERATURE", 0.0), "NKD.TEMPERATURE: 0.0 is not above 0"),
        (("NKD.NON_TARGET_WEIGHT", -1.0), "NON_TARGET_WEIGHT: -1.0 is not a finite weight"),
        (("CLASSES", 1), r"NKD.NON_TARGET_WEIGHT: 1.5 with .*NUM_CLASSES 1: .* of 2, background"),
        (("CLASSES", 1, "NKD.NON_TARGET_WEIGHT", 0.0), ""),
    ],
)
def test_values_that_cannot_work_are_refused(options, message, tiny_cfg, tmp_path):
    cfg = distilled(tiny_cfg("GeneralizedRCNN"), tmp_path)
    cfg.MODEL.DISTILLER.METHOD = "NKD"
    check_config(cfg)
    for key, value in zip(options[::2], options[1::2]):
        key = "MODEL.ROI_HEADS.NUM_CLASSES" if key == "CLASSES" else f"MODEL.DISTILLER.{key}"
        cfg.merge_from_list([key, value])
    if not message:
        check_config(cfg)
        return
    with pytest.raises(UserError, match=message):
        check_config(cfg)


@pytest.mark.parametrize("method", ["NKD", "TfNKD"])
def test_a_detector_learns_from_it(method, tiny_cfg, tmp_path, make_batch):
    cfg = distilled(tiny_cfg("GeneralizedRCNN"), tmp_path)
    cfg.MODEL.DISTILLER.METHOD = method
    node = cfg.MODEL.DISTILLER[method.upper()]
    for key in node:
        if key.startswith("BACKGROUND"):
            node[key] = 0.1
    if method == "TfNKD":
        cfg.MODEL.DISTILLER.TEACHER.update(WEIGHTS="", CONFIG_FILE="")
    model = build_model(cfg)
    assert (model.teacher is None) == (method == "TfNKD")
    assert not list(model.distillation.parameters())
    with EventStorage():
        losses = model(make_batch())
    own = [losses[name] for name in model.distillation.loss_names]
    assert len(own) == len(model.distillation.terms)
    assert all(value.isfinite() and value > 0 for value in own)
    body = [p for p in model.student.backbone.bottom_up.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(own), body, allow_unused=True)
    assert sum(g.abs().sum() for g in gradients if g is not None) > 0
    batch = make_batch()
    for sample in batch:
        sample["instances"] = sample["instances"][:0]
    with EventStorage():
        losses = model(batch)
    for name in model.distillation.loss_names:
        assert (losses[name] == 0) == ("background" not in name) and losses[name].requires_grad


def test_without_a_teacher_it_is_examined_trained_and_resumed(tmp_path, capsys):
    cfg = training_cfg(tmp_path, "GeneralizedRCNN")
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DISTILLER.STUDENT = "Distiller", "GeneralizedRCNN"
    cfg.MODEL.DISTILLER.METHOD, cfg.MODEL.DISTILLER.PICTURE_PERIOD = "TfNKD", 1
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.DOCTOR.BATCHES = 2, (1,), 1
    config = ["--config-file", str(write_config(cfg, tmp_path / "tf.yaml"))]
    out = tmp_path / "out"
    for words in (["--doctor"], [], ["--resume", "SOLVER.MAX_ITER", "3"]):
        code = train_net([*config[:2], *words])
        setup_logger.cache_clear()
        assert code == 0, capsys.readouterr().err
    report = json.loads((out / "doctor.json").read_text())
    assert {x["name"]: x["verdict"] for x in report["findings"]}["gradients"] == "ok"
    lines = [json.loads(x) for x in (out / "metrics.json").read_text().splitlines()]
    assert lines[-1]["iteration"] == 2 and lines[-1]["distill/regions"] > 0
    assert "TfNKD (target_weight 1.0" in (out / "log.txt").read_text()
    image = str(tmp_path / "data" / "images" / "0.png")
    assert visualize([str(out / "model_final.pth"), image]) == 2
    assert "TfNKD uses no maps that could be drawn" in capsys.readouterr().err
