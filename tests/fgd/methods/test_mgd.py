from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fgd.config import check_config, get_fgd_cfg, load_config
from fgd.errors import UserError
from fgd.methods.batch import Level
from fgd.methods.method import over_levels
from fgd.methods.mgd import MGD, MGDLevelLoss, draw_keep, generation_term
from tests.fgd.methods.batches import make_batch as make_maps_batch
from tests.fgd.training import distilled

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "mgd").glob("*.npz"))
CONFIGS = Path(__file__).parents[3] / "configs"
NO_BOXES = torch.zeros(0, 4)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def level_loss(student_channels, teacher_channels, seed=0):
    torch.manual_seed(seed)
    return MGDLevelLoss(student_channels, teacher_channels).double()


def drawn(student, masked_ratio, seed=0):
    return draw_keep(student, masked_ratio, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_golden_value_and_gradients(path, dtype, tolerance):
    content = np.load(path)
    tensor = {k: torch.from_numpy(content[k]).to(dtype) for k in content.files}
    loss = MGDLevelLoss(tensor["student"].shape[1], tensor["teacher"].shape[1]).to(dtype)
    loss.load_state_dict({k[6:]: v for k, v in tensor.items() if k.startswith("param/")})
    student = tensor["student"].clone().requires_grad_()
    alpha = float(content["alpha"])
    value = alpha * loss(student, tensor["teacher"], tensor["keep_mask"])
    value.backward()
    assert value.item() == pytest.approx(float(content["loss"]), rel=tolerance)
    wanted = {k[5:]: v for k, v in tensor.items() if k.startswith("grad/")}
    found = {name: parameter.grad for name, parameter in loss.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in {**wanted, "student": tensor["grad_student"]}.items():
        error = ({**found, "student": student.grad}[name] - gradient).abs().max()
        assert error <= tolerance * gradient.abs().max().clamp(min=1e-6), name


def test_there_are_five_golden_cases():
    assert len(GOLDEN) == 5


def convolved(image, weight, bias):
    """Convolution of nested lists (C, H, W) with an odd kernel, zeros around."""
    height, width, reach = len(image[0]), len(image[0][0]), len(weight[0][0]) // 2

    def at(kernel, y, x):
        return sum(
            kernel[c][i + reach][j + reach] * image[c][y + i][x + j]
            for c in range(len(image))
            for i in range(-reach, reach + 1)
            for j in range(-reach, reach + 1)
            if 0 <= y + i < height and 0 <= x + j < width
        )

    return [
        [[b + at(kernel, y, x) for x in range(width)] for y in range(height)]
        for kernel, b in zip(weight, bias, strict=True)
    ]


def reference(student, teacher, keep, parameters):
    """The definition, cell by cell."""
    values = {name: p.tolist() for name, p in parameters.items()}
    conv = lambda x, name: convolved(x, values[f"{name}.weight"], values[f"{name}.bias"])  # noqa: E731
    total = 0.0
    for image, taught, kept in zip(student.tolist(), teacher.tolist(), keep.tolist(), strict=True):
        if "align.weight" in values:
            image = conv(image, "align")
        masked = [
            [[v * k for v, k in zip(*rows)] for rows in zip(channel, kept[0])] for channel in image
        ]
        hidden = conv(masked, "generation.0")
        hidden = [[[max(v, 0.0) for v in row] for row in channel] for channel in hidden]
        for channel, other in zip(conv(hidden, "generation.2"), taught, strict=True):
            for row, wanted in zip(channel, other, strict=True):
                total += sum((p - t) ** 2 for p, t in zip(row, wanted, strict=True))
    return total / len(student)


@settings(max_examples=30, deadline=None)
@given(
    images=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    masked_ratio=st.sampled_from([0.0, 0.3, 0.65, 1.0]),
    seed=st.integers(0, 99),
)
def test_equals_the_literal_reference(images, channels, size, masked_ratio, seed):
    student = random(images, channels[0], *size, seed=seed).requires_grad_()
    teacher = random(images, channels[1], *size, seed=seed + 100)
    keep = drawn(student, masked_ratio, seed)
    loss = level_loss(*channels, seed)
    value = loss(student, teacher, keep)
    wanted = reference(student, teacher, keep, dict(loss.named_parameters()))
    assert value.item() == pytest.approx(wanted, rel=1e-9)
    value.backward()
    assert student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize("channels", [(2, 2), (1, 2)], ids=["same", "align"])
def test_gradcheck(channels):
    loss = level_loss(*channels)
    teacher = random(2, channels[1], 3, 4, seed=1)
    names = [name for name, _ in loss.named_parameters()]

    def value(student, *parameters):
        arguments = student, teacher, drawn(student, 0.4)
        return torch.func.functional_call(loss, dict(zip(names, parameters)), arguments)

    student = random(2, channels[0], 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(value, (student, *loss.parameters()))


def golden_vector():
    i = torch.arange(2 * 4 * 5 * 6, dtype=torch.float64)
    student = (torch.sin(0.37 * i + 1.0) + 0.1).view(2, 4, 5, 6)
    return student, (torch.sin(0.37 * i + 2.0) + 0.2).view(2, 4, 5, 6)


def test_without_a_mask_and_generation_it_is_the_squared_error():
    student, teacher = golden_vector()
    assert generation_term(student, teacher).item() == pytest.approx(55.882779401932396, rel=1e-13)
    loss = level_loss(4, 4)
    with torch.no_grad():  # both convolutions the identity; above 0 the ReLU is too
        for conv in (loss.generation[0], loss.generation[2]):
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
    value = loss(student + 3, teacher + 3, drawn(student, 0.0))
    assert value.item() == pytest.approx(55.882779401932396, rel=1e-13)
    # By hand, one cell in four kept: the others generate 0.
    one = level_loss(1, 1)
    one.generation = nn.Identity()
    keep = torch.tensor([0.0, 1, 0, 0]).view(1, 1, 1, 4)
    own, other = (torch.tensor(x).double().view(1, 1, 1, 4) for x in ([1, 2, 3, 4], [1, 5, -2, 0]))
    assert one(own, other, keep).item() == 1 + 9 + 4 + 0
    assert one(own.repeat(3, 1, 1, 1), other.repeat(3, 1, 1, 1), keep).item() == 14  # a mean of 3


def test_with_all_masked_the_student_does_not_count():
    loss = level_loss(3, 4)
    teacher = random(2, 4, 5, 6, seed=1)
    student = random(2, 3, 5, 6).requires_grad_()
    keep = drawn(student, 1.0)
    value = loss(student, teacher, keep)
    value.backward()
    assert student.grad.abs().max() == 0 and loss.align.weight.grad.abs().max() == 0
    assert loss(100 * student, teacher, keep).item() == value.item() > 0
    assert loss.generation[2].bias.grad.abs().min() > 0


def test_masked_cells_give_no_gradient_and_the_map_is_left_as_it_is():
    loss = level_loss(4, 4)
    leaf = random(2, 4, 5, 6).requires_grad_()
    student = leaf * 1  # as from a network, so that a change in place would not be refused
    keep = drawn(student, 0.5)
    loss(student, random(2, 4, 5, 6, seed=1), keep).backward()
    assert torch.equal(student, leaf)
    reached = leaf.grad.abs().sum(dim=1, keepdim=True) > 0
    assert torch.equal(reached, keep > 0) and 0 < keep.sum() < keep.numel()


@pytest.mark.parametrize("masked_ratio", [0.0, 0.15, 0.45, 0.65, 1.0])
def test_the_share_of_masked_cells(masked_ratio):
    keep = drawn(torch.zeros(10, 3, 100, 100), masked_ratio)
    assert keep.shape == (10, 1, 100, 100) and keep.dtype == torch.float32
    assert set(keep.unique().tolist()) <= {0.0, 1.0}
    error = abs((1 - keep).mean().item() - masked_ratio)
    assert error < 0.01 and (error == 0 or 0 < masked_ratio < 1)
    rows = keep[:, 0].mean(dim=(0, 2))  # no pattern
    assert (rows - rows.mean()).abs().max() < 0.1


LEVELS = [Level("p3", 4, 4), Level("p4", 2, 4)]


def method(masked_ratio=0.65, weight=1.0):
    torch.manual_seed(3)
    return MGD(LEVELS, {"generation": weight}, masked_ratio)


def batch(dtype=torch.float32, **options):
    maps = lambda c4, seed: {  # noqa: E731
        "p3": random(2, 4, 8, 9, seed=seed).to(dtype),
        "p4": random(2, c4, 8, 9, seed=seed + 1).to(dtype),
        "p9": torch.full((1,), torch.nan),  # a level that is not distilled is never looked at
    }
    return make_maps_batch(maps(2, 0), maps(4, 7), [NO_BOXES] * 2, (64, 72), **options)


def test_masks_depend_on_seed_iteration_rank_and_level_alone():
    own, keys = method(), [{}, {"iteration": 1}, {"seed": 1}, {"rank": 1}]
    masks = [own.keep(batch(**key), name) for key in keys for name in ("p3", "p4")]
    for i, mask in enumerate(masks):
        assert all(0.2 < (mask - other).abs().mean() < 0.75 for other in masks[:i])
        assert (mask[0] - mask[1]).abs().sum() > 0  # images differ too
    state = torch.get_rng_state()
    for other in (own, method(), method()):
        other(batch())  # what was drawn before does not count
        for i, key in enumerate(keys):
            assert torch.equal(other.keep(batch(**key), "p4"), masks[2 * i + 1])
            assert torch.equal(other.keep(batch(torch.float16, **key), "p3"), masks[2 * i])
        torch.set_rng_state(state)
    own(batch()), own.pictures(batch(), 0)
    assert torch.equal(torch.get_rng_state(), state)  # the student's numbers are left alone
    first, again, later = (own(batch(**key))["p3"]["generation"] for key in ({}, {}, keys[1]))
    assert first == again != later


def test_the_table_and_its_weights():
    given, own = batch(), method(weight=2.0)
    table = own.table(given)
    assert list(table) == ["p3", "p4"] and own.loss_names == ("loss_mgd_generation",)
    for name, terms in table.items():
        maps = given.student[name], given.teacher[name], own.keep(given, name)
        torch.testing.assert_close(terms["mgd_generation"], 2 * own.levels[name](*maps))
    assert own.levels["p4"].align.weight.shape == (4, 2, 1, 1) and own.levels["p3"].align is None
    zero = over_levels(method(weight=0.0).table(given))["mgd_generation"]
    zero.backward()
    assert zero.item() == 0
    given.teacher["p4"] = torch.zeros(2, 4, 8, 10)
    with pytest.raises(ValueError, match=r"MGD level 'p4': .*\(2, 2, 8, 9\).*\(2, 4, 8, 10\)"):
        own(given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision(dtype):
    # The sum over 1.6 million values is 25 times the largest number of float16.
    student = random(1, 24, 200, 336).to(dtype).requires_grad_()
    teacher = (random(1, 24, 200, 336, seed=1) * 3).to(dtype)
    loss, keep = level_loss(24, 24), drawn(student, 0.65)
    exact = loss(student.double(), teacher.double(), keep)
    value = loss.float()(student, teacher, keep)
    assert value.dtype == torch.float32 and value > 25 * 65504
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    (value * 2e-5).backward()
    assert student.grad.dtype == dtype and student.grad.isfinite().all()
    assert student.grad.abs().max() > 0


def test_little_is_kept_for_the_backward_pass():
    # What the two convolutions read, and the error.
    student, teacher = random(2, 4, 6, 8).requires_grad_(), random(2, 4, 6, 8, seed=1)
    loss, kept = level_loss(4, 4), {}
    hooks = lambda x: kept.update({x.untyped_storage().data_ptr(): x.numel()}) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(hooks, lambda x: x):
        loss(student, teacher, drawn(student, 0.65))
    for parameter in loss.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == 3 * student.numel() + student.numel() // 4  # and the mask


def test_teacher_gets_no_gradient_and_unequal_maps_are_refused():
    loss, teacher = level_loss(2, 2), random(1, 2, 3, 3).requires_grad_()
    loss(random(1, 2, 3, 3, seed=1), teacher, torch.ones(1, 1, 3, 3)).backward()
    assert teacher.grad is None
    for student in (torch.zeros(2, 2, 3, 3), torch.zeros(1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"need the same number of images, at least one"):
            loss(student, teacher, torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="at least one"):
        loss(torch.zeros(0, 2, 3, 3), torch.zeros(0, 2, 3, 3), torch.ones(0, 1, 3, 3))


def test_parameters_are_those_of_the_paper():
    loss = MGDLevelLoss(256, 256)
    assert sum(p.numel() for p in loss.parameters()) == 1_180_160
    assert MGDLevelLoss(64, 256).align.weight.shape == (256, 64, 1, 1)


def test_pictures_show_the_mask_that_was_drawn():
    given, own = batch(iteration=5), method()
    found = own.pictures(given, 1)
    for name in ("p3", "p4"):
        assert list(found[name]) == ["teacher response", "student response", "masked"]
        masked = found[name]["masked"].values
        assert masked.shape == (8, 9) and 0.4 < masked.mean() < 0.9
        # The loss of this mask is the loss of the step.
        keep = own.keep(given, name).clone()
        keep[1, 0] = torch.from_numpy(1 - masked)
        value = own.levels[name](given.student[name], given.teacher[name], keep)
        torch.testing.assert_close(value, own(given)[name]["generation"], rtol=0, atol=0)


def test_keys_and_their_checks():
    cfg = get_fgd_cfg()
    node = cfg.MODEL.DISTILLER.MGD
    assert dict(node) == {"GENERATION_WEIGHT": 2e-5, "MASKED_RATIO": 0.65}
    node.MASKED_RATIO = 0.45
    own = MGD.from_config(cfg, LEVELS)
    assert (own.weights, own.masked_ratio) == ({"generation": 2e-5}, 0.45)
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.update(METHOD="MGD", STUDENT="RetinaNet")
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "teacher.pth"
    cfg.MODEL.DEVICE = "cpu"
    for ratio in (0.0, 1.0, 0.65):
        node.MASKED_RATIO = ratio
        check_config(cfg)
    for ratio in (-0.1, 1.01, float("nan")):
        node.MASKED_RATIO = ratio
        with pytest.raises(UserError, match=f"MGD.MASKED_RATIO: {ratio} is not between 0 and 1"):
            check_config(cfg)


def test_configs_state_the_published_settings():
    dense, two_stage = (2e-5, 0.65, True), (5e-7, 0.45, False)
    table = {"retinanet": dense, "reppoints": dense, "frcnn": two_stage, "mask_rcnn": two_stage}
    assert {path.stem for path in CONFIGS.glob("mgd_*.yaml")} == {f"mgd_{name}" for name in table}
    for name, wanted in table.items():
        cfg = load_config(str(CONFIGS / f"mgd_{name}.yaml"))
        node, clip = cfg.MODEL.DISTILLER, cfg.SOLVER.CLIP_GRADIENTS
        assert (*node.MGD.values(), node.INHERIT) == wanted
        assert (clip.ENABLED, clip.CLIP_VALUE, cfg.SOLVER.MAX_ITER) == (True, 35.0, 180000)


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_it_trains_a_detector(arch, tiny_cfg, tmp_path, make_batch):
    cfg = distilled(tiny_cfg(arch), tmp_path, channels=24)
    cfg.MODEL.DISTILLER.METHOD = "MGD"
    torch.manual_seed(0)
    model, inputs = build_model(cfg), make_batch()
    inputs[1]["instances"] = inputs[1]["instances"][:0]  # boxes play no part
    with EventStorage():
        losses = model(inputs)
    assert all(x.isfinite() for x in losses.values()) and losses["loss_mgd_generation"] > 0
    dense = ["p3", "p4", "p5", "p6", "p7"]
    assert list(model.table) == (dense if arch == "RetinaNet" else ["p2", "p3", "p4", "p5"])
    losses["loss_mgd_generation"].backward()
    assert next(model.student.backbone.bottom_up.parameters()).grad.abs().sum() > 0
    gradients = {name: p.grad for name, p in model.distillation.named_parameters()}
    assert len(gradients) == 6 * len(model.table)  # three convolutions: channels differ
    assert all(x is not None and x.isfinite().all() for x in gradients.values())
    assert gradients["levels.p4.align.weight"].abs().sum() > 0
    assert "masked_ratio 0.65" in model.describe()
