import pytest
import torch
from detectron2.modeling import build_model

from fgd.bench.cases import draw_batch
from fgd.bench.workload import build_workload, norms_from_data
from fgd.errors import UserError

SIZE = (64, 96)


def test_random_networks_are_normalised_by_their_own_data(tiny_cfg):
    model = build_model(tiny_cfg())
    inputs = draw_batch(SIZE, 2, 2, classes=3)
    images = model.preprocess_image(inputs).tensor
    norms = {n: m for n, m in model.backbone.named_modules() if hasattr(m, "running_var")}
    before = {name: norm.running_var.clone() for name, norm in norms.items()}
    model.eval()
    with torch.no_grad(), norms_from_data(model.backbone):
        model.backbone(images)
    assert norms and not any(torch.equal(norms[k].running_var, before[k]) for k in norms)
    seen = []
    first = next(iter(norms.values()))
    first.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model.backbone(images)
    torch.testing.assert_close(first.running_mean, seen[0].mean(dim=(0, 2, 3)))
    spread = seen[0].var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(first.running_var, spread)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MODEL.META_ARCHITECTURE": "RetinaNet"}, "needs a distillation config"),
        ({"MODEL.DISTILLER.METHOD": ""}, "needs a distillation config"),
        ({"MODEL.MASK_ON": True}, "MASK_ON"),
        ({"MODEL.DISTILLER.TEACHER.CONFIG_FILE": ""}, "CONFIG_FILE"),
        ({"MODEL.DISTILLER.TEACHER.WEIGHTS": "nowhere.pth"}, "nowhere.pth"),
        ({"MODEL.DISTILLER.TEACHER.PRECISION": "float16"}, "needs CUDA"),
    ],
)
def test_what_cannot_be_measured(config, changes, message):
    cfg = config()
    cfg.merge_from_list([x for pair in changes.items() for x in pair])
    with pytest.raises(UserError, match=message):
        build_workload(cfg, SIZE, 1, 1)


def test_what_is_measured_distils_whatever_the_schedule(config):
    cfg = config()
    cfg.MODEL.DISTILLER.STUDENT, cfg.MODEL.FCOS.NUM_CLASSES = "FCOS", 1
    cfg.MODEL.DISTILLER.FACTOR = 0.5
    cfg.MODEL.DISTILLER.SCHEDULE.update(START=10, WARMUP_ITERS=10)
    work = build_workload(cfg, SIZE, batch=1, boxes=2)
    assert work.distiller.schedule.value(0) == 0.5
    assert work.batch[0]["instances"].gt_classes.tolist() == [0, 0]  # of the student's classes
    assert cfg.MODEL.DISTILLER.SCHEDULE.START == 10  # the caller's is untouched
    levels = work.distiller.sources.keys()
    assert all(teacher.sources.keys() == levels for teacher in work.teachers.values())


def test_all_share_one_set_of_weights_and_keep_their_own_modules(toys, config):
    cfg = config("GeneralizedRCNN")
    work = build_workload(cfg, SIZE, 1, 2, ["Maps", "Logits", "Alone"], "FGD", variants=False)
    assert list(work.distillers) == ["Maps", "Logits", "Alone", "FGD"] and not work.teachers
    assert work.random == ["teacher", "student"] and work.distiller is work.distillers["Maps"]
    own = {k: id(v) for k, v in work.student.state_dict(keep_vars=True).items()}
    teachers = [d.teacher for d in work.distillers.values() if d.teacher is not None]
    assert len(teachers) == 3 and len(own) > 100
    for distiller in work.distillers.values():
        found = distiller.student.state_dict(keep_vars=True)
        assert {k: id(v) for k, v in found.items()} == own
        assert all(p.requires_grad for p in distiller.student.backbone.parameters())
    first, with_heads, last = (x.parts["backbone"].state_dict(keep_vars=True) for x in teachers)
    assert all(first[k] is with_heads[k] is last[k] and not first[k].requires_grad for k in first)
    assert [*teachers[1].parts] == ["backbone", "roi_heads"]
    assert len([*work.distillers["FGD"].distillation.parameters()]) > 0


def test_the_first_inherits_for_all(toys, config, tmp_path):
    cfg = config(trained=True)
    cfg.MODEL.DISTILLER.INHERIT = True
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)["model"]
    bias = "head.bbox_pred.bias"  # of equal shape
    weights[bias] += 3.0
    torch.save({"model": weights}, tmp_path / "teacher.pth")
    work = build_workload(cfg, SIZE, 1, 2, ["Alone", "Maps"], variants=False)
    for model in (work.student, *(x.student for x in work.distillers.values())):
        assert torch.equal(model.state_dict()[bias], weights[bias])
    assert [x.teacher is None for x in work.distillers.values()] == [True, False]


def test_one_beside_only_where_it_can_work(toys, config):
    build = lambda *args: build_workload(config(), SIZE, 1, 2, *args, variants=False)  # noqa: E731
    work = build((), "Logits")
    assert list(work.distillers) == ["FGD"] and [*work.left_out] == ["Logits"]
    assert "needs RoI logits" in work.left_out["Logits"]
    work = build(["FGD", "Maps", "FGD"], "FGD")
    assert list(work.distillers) == ["FGD", "Maps"] and work.left_out == {}


def test_batches_have_what_a_method_asks_for(toys, config):
    work = build_workload(config(), SIZE, 2, 2, ["Maps", "Views"], variants=False)
    for sample in work.batch:
        assert sample["second_image"].shape == sample["image"].shape == (3, *SIZE)
