"""IKD's term against the authors' figures and against loops; its keys; a step and the phase."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.config import check_config, get_fgd_cfg
from fgd.errors import UserError
from fgd.methods.batch import Level, SecondView
from fgd.methods.ikd import DISTANCES, IKD, distance_of_maps
from tests.fgd.engine.test_trainer import assert_same_end, begin_second, read_metrics, train
from tests.fgd.methods.batches import make_batch as batch_of
from tests.fgd.training import distilled, training_cfg

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "ikd").glob("*.npz"))


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def second(student, teacher, boxes=None):
    """A batch whose first images' maps would be noticed if they were looked at."""
    images = len(next(iter(student.values())))
    nans = {k: torch.full_like(v, math.nan) for k, v in student.items()}
    boxes = boxes or [torch.zeros(0, 4)] * images
    return batch_of(nans, nans, boxes, (32, 64), second_view=SecondView(student, teacher))


def error(found, wanted):
    """The largest difference relative to the largest magnitude of the array."""
    return ((found - wanted).abs().max() / max(wanted.abs().max().item(), 1e-6)).item()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_value_and_gradients_are_the_authors(path, dtype, tolerance):
    assert len(GOLDEN) == 4
    content = np.load(path)
    tensor = {
        k: torch.from_numpy(content[k]).to(dtype) for k in content.files if content[k].ndim > 0
    }
    names = [f"p{i}" for i in range(int(content["num_levels"]))]
    student, teacher = (
        {name: tensor[f"{who}_{i}"] for i, name in enumerate(names)}
        for who in ("student", "teacher")
    )
    name = names[int(content["level"])]  # the authors' loss object has one
    level = Level(name, student[name].shape[1], teacher[name].shape[1])
    settings = float(content["alpha"]), str(content["distance"]), float(content["tau"])
    method = IKD([level], *settings).to(dtype)
    parameters = {k[6:]: v for k, v in tensor.items() if k.startswith("param/")}
    method.load_state_dict({k.replace("align", f"align.{name}"): v for k, v in parameters.items()})
    for value in student.values():
        value.requires_grad_()
    table = method(second(student, teacher))
    assert list(table) == [name] and list(table[name]) == ["adversarial"]
    loss = table[name]["adversarial"]
    loss.backward()
    assert error(loss.detach(), torch.tensor(float(content["loss"]), dtype=dtype)) < tolerance
    for i, own in enumerate(names):
        wanted = tensor[f"grad_student_{i}"]
        if own != name:
            assert not wanted.any() and student[own].grad is None  # exactly 0 in theory
        else:
            assert error(student[own].grad, wanted) < tolerance
    for key in parameters:
        found = method.get_parameter(key.replace("align", f"align.{name}")).grad
        assert error(found, tensor[f"grad/{key}"]) < tolerance


def by_hand(student, teacher, distance, tau):
    """The equations in loops over Python numbers."""
    images, channels, height, width = student.shape
    total = 0.0
    for n in range(images):
        for c in range(channels):
            s, t = (
                [float(x[n, c, i, j]) for i in range(height) for j in range(width)]
                for x in (student, teacher)
            )
            if distance == "mse":
                total += sum((a - b) ** 2 for a, b in zip(s, t)) / images
            elif distance == "l1":
                total += sum(abs(a - b) for a, b in zip(s, t)) / images
            else:
                sides = []
                for values in (s, t):
                    largest = max(values)
                    powers = [math.exp((v - largest) / tau) for v in values]
                    sides.append([p / sum(powers) for p in powers])
                p_student, p_teacher = sides
                kl = sum(q * math.log(q / p) for p, q in zip(p_student, p_teacher))
                total += tau**2 * kl / (channels * images)
    return total


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    distance=st.sampled_from(DISTANCES),
    tau=st.floats(0.3, 8),
    scale=st.floats(0.1, 10),
    seed=st.integers(0, 1000),
)
def test_it_is_the_equations(shape, distance, tau, scale, seed):
    student, teacher = scale * random(*shape, seed=seed), random(*shape, seed=seed + 1)
    found = distance_of_maps(student, teacher, distance, tau).item()
    assert found == pytest.approx(by_hand(student, teacher, distance, tau), rel=1e-10, abs=1e-12)


def test_a_case_by_hand():
    student = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 4.0]]]])
    teacher = torch.tensor([[[[0.0, 4.0]]], [[[0.0, 1.0]]]])
    assert distance_of_maps(student, teacher, "mse").item() == (1 + 4 + 0 + 9) / 2
    assert distance_of_maps(student, teacher, "l1").item() == (1 + 2 + 0 + 3) / 2
    # Softmax of (0, log 3) is (1/4, 3/4), of (0, 0) it is (1/2, 1/2).
    own, taught = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, math.log(3)]]]])
    wanted = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert distance_of_maps(own, taught, "cwd").item() == pytest.approx(wanted, rel=1e-6)
    warm = distance_of_maps(2 * own, 2 * taught, "cwd", 2.0).item()
    assert warm == pytest.approx(4 * wanted, rel=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_invariances(distance):
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    value = distance_of_maps(student, teacher, distance, 2.0)
    assert distance_of_maps(teacher, teacher, distance, 2.0).item() == 0
    halves = [
        distance_of_maps(student[i : i + 1], teacher[i : i + 1], distance, 2.0) for i in (0, 1)
    ]
    torch.testing.assert_close(value, sum(halves) / 2)  # a mean over images: data parallelism
    moved = distance_of_maps(student.flip(3), teacher.flip(3), distance, 2.0)
    torch.testing.assert_close(moved, value)
    shifted = distance_of_maps(student + 3, teacher, distance, 2.0)
    assert (abs(shifted - value) < 1e-12) == (distance == "cwd")  # a softmax ignores a constant
    assert distance_of_maps(student[:, :, :1, :1], teacher[:, :, :1, :1], "cwd").item() == 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients(distance):
    student, teacher = random(2, 3, 2, 3).requires_grad_(), random(2, 3, 2, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: distance_of_maps(x, teacher, distance, 1.5), student)
    teacher.requires_grad_()
    distance_of_maps(student, teacher, distance, 1.5).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_half_precision_maps(distance, dtype):
    """Sums over a large map are above float16's largest number."""
    student = (4 * random(1, 16, 100, 168)).to(dtype).requires_grad_()
    teacher = (4 * random(1, 20, 100, 168, seed=1)).to(dtype)
    method = IKD([Level("p3", 16, 20)], 1.0, distance)
    value = method(second({"p3": student}, {"p3": teacher}))["p3"]["adversarial"]
    exact = copy.deepcopy(method).double()(
        second({"p3": student.double()}, {"p3": teacher.double()})
    )
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact["p3"]["adversarial"].item(), rel=1e-4)
    (value * 1e-3).backward()
    assert student.grad.isfinite().all() and student.grad.any()


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 1, 7), (3, 4, 5, 1)])
@pytest.mark.parametrize("distance", DISTANCES)
def test_odd_sizes_and_images_without_objects(distance, shape):
    maps = {"p3": random(*shape).requires_grad_()}, {"p3": random(*shape, seed=1)}
    method = IKD([Level("p3", 4, 4)], 0.5, distance).double()
    values = [
        method(second(*maps, boxes))["p3"]["adversarial"]
        for boxes in ([torch.zeros(0, 4)] * shape[0], [torch.tensor([[1.0, 1, 9, 9]])] * shape[0])
    ]
    assert values[0] == values[1] and values[0].isfinite()
    wanted = by_hand(maps[0]["p3"].detach(), maps[1]["p3"], distance, 1.0)
    assert values[0].item() == pytest.approx(0.5 * wanted, rel=1e-10, abs=1e-14)
    values[0].backward()
    assert maps[0]["p3"].grad.isfinite().all()


@pytest.mark.parametrize("distance, most", [("mse", 1), ("l1", 1), ("cwd", 2)])
def test_what_is_kept_for_the_backward_pass(distance, most):
    """In maps of the student's size, beside what the forward of the backbone keeps itself."""
    student, teacher = random(2, 8, 20, 30).requires_grad_(), random(2, 8, 20, 30, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        distance_of_maps(student, teacher, distance)
    total = sum({x.data_ptr(): x.numel() for x in kept}.values())
    assert student.numel() <= total <= most * student.numel() + 10


def test_maps_that_differ_name_the_level_and_no_second_images_give_no_term():
    method = IKD([Level("p4", 4, 4)], 1.0)
    with pytest.raises(ValueError, match=r"IKD level 'p4': student map \(1, 4, 3, 3\).*4, 3, 4\)"):
        method(second({"p4": torch.zeros(1, 4, 3, 3)}, {"p4": torch.zeros(1, 4, 3, 4)}))
    with pytest.raises(ValueError, match="at least one image"):
        distance_of_maps(torch.zeros(0, 4, 3, 3), torch.zeros(0, 4, 3, 3), "mse")
    none = second({"p4": torch.zeros(1, 4, 3, 3)}, {})
    none.second_view = None
    assert method(none) == {} and method.loss_names == ("loss_ikd_adversarial",)


def test_keys_and_refusals():
    cfg = get_fgd_cfg()
    node = cfg.MODEL.DISTILLER.IKD
    assert dict(node) == {"ADVERSARIAL_WEIGHT": 1e-5, "DISTANCE": "mse", "TEMPERATURE": 1.0}
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "Distiller"
    cfg.MODEL.DISTILLER.METHOD = "FGD+IKD"
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "teacher.pth"
    check_config(cfg)
    for key, value, message in (
        ("DISTANCE", "l2", "IKD.DISTANCE: 'l2' is not one of mse, l1, cwd"),
        ("TEMPERATURE", 0.0, "IKD.TEMPERATURE: 0.0 is not a finite number above 0"),
        ("TEMPERATURE", math.inf, "IKD.TEMPERATURE: inf is not a finite number above 0"),
        ("ADVERSARIAL_WEIGHT", -1.0, "IKD.ADVERSARIAL_WEIGHT: -1.0 is not a finite weight"),
    ):
        wrong = cfg.clone()
        wrong.MODEL.DISTILLER.IKD[key] = value
        with pytest.raises(UserError, match=message):
            check_config(wrong)


@pytest.mark.parametrize("method", ["IKD", "FGD+IKD"])
def test_a_step_through_a_distiller(method, tiny_cfg, tmp_path, make_batch):
    cfg = distilled(tiny_cfg(), tmp_path)  # of 24 channels, over 16
    cfg.MODEL.DISTILLER.METHOD = method
    cfg.MODEL.DISTILLER.IKD.ADVERSARIAL_WEIGHT = 1e-3
    cfg.DATASETS.TRAIN_SECOND_IMAGES = "somewhere"
    torch.manual_seed(0)
    model = build_model(cfg)
    assert "IKD on p3, p4, p5, p6, p7 (adversarial_weight 0.001" in model.describe()
    with EventStorage():
        losses = model(make_batch())
    assert list(model.table) == ["p3", "p4", "p5", "p6", "p7"]
    term = losses["loss_ikd_adversarial"]
    wanted = sum(x["ikd_adversarial"] for x in model.table.values())
    assert 0 < term.item() == pytest.approx(wanted.item(), rel=1e-5)
    term.backward()
    assert next(model.student.backbone.bottom_up.parameters()).grad.abs().sum() > 0
    align = {k: p for k, p in model.named_parameters() if "align.p" in k and "fgd" not in k}
    assert len(align) == 10 and all(p.grad.any() for p in align.values())
    changed = make_batch()
    for sample in changed:
        sample["second_image"] = sample["second_image"].flip(-1)
    with EventStorage():
        again = model(changed)
    assert again["loss_ikd_adversarial"] != term
    others = [k for k in losses if k != "loss_ikd_adversarial"]
    assert all(torch.equal(again[k], losses[k]) for k in others if "fgd" in k)


def test_weight_zero(tiny_cfg, tmp_path, make_batch):
    cfg = distilled(tiny_cfg(), tmp_path)
    cfg.MODEL.DISTILLER.METHOD, cfg.MODEL.DISTILLER.IKD.ADVERSARIAL_WEIGHT = "IKD", 0.0
    cfg.DATASETS.TRAIN_SECOND_IMAGES = "somewhere"
    model = build_model(cfg)
    with EventStorage():
        losses = model(make_batch())
    assert losses["loss_ikd_adversarial"] == 0
    losses["loss_ikd_adversarial"].backward()
    assert not next(model.student.backbone.bottom_up.parameters()).grad.any()


def test_a_run_ends_its_phase_and_resumes_bit_equal(tmp_path):
    """As published: augmented with the term, then plain with the other method alone."""
    opts = ("INPUT.SAMPLE_SPECIFIC.ENABLED", True, "INPUT.PLAIN_FROM", 6)
    cfg = distilled(training_cfg(tmp_path, opts=opts), tmp_path)
    cfg.MODEL.DISTILLER.METHOD, cfg.MODEL.DISTILLER.FACTOR = "FGD+IKD", 0.01
    train(cfg)
    first = Path(cfg.OUTPUT_DIR)
    begin_second(cfg, tmp_path / "second")
    assert train(cfg, resume=True).start_iter == 4
    assert_same_end(first, tmp_path / "second")
    last = read_metrics(tmp_path / "second")
    assert last["loss_fgd_attention"] > 0
