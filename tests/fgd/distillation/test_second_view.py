"""Both sides see the second images as alone, and the first ones as if there were no others."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from fgd.bench.cases import draw_batch
from fgd.bench.workload import build_workload
from fgd.data.stream import build_train_stream
from fgd.distillation.config import wants_second_images
from fgd.doctor.losses import measure
from fgd.engine.trainer import FGDTrainer
from fgd.errors import UserError
from fgd.methods.batch import SecondView
from fgd.methods.method import METHOD_REGISTRY, Method
from tests.fgd.engine.test_trainer import assert_same_end, begin_second, load, train
from tests.fgd.training import distilled, training_cfg

from .test_distiller import pair, reppoints


@pytest.fixture(autouse=True)
def twice():
    """A registered method of the second view alone, which draws the two sides' distance."""

    @METHOD_REGISTRY.register()
    class Twice(Method):
        terms = ("distance",)
        needs = frozenset({"teacher", "maps", "second_view"})

        def forward(self, batch):
            self.given = batch
            view = batch.second_view
            if view is None:
                return {}
            return {
                name: self.weigh({"distance": (view.student[name] - taught).square().mean()})
                for name, taught in view.teacher.items()
            }

    yield Twice
    METHOD_REGISTRY._obj_map.pop("Twice")


def make(cfg, tmp_path, method="Twice"):
    """A Distiller between two detectors of equal channels."""
    torch.manual_seed(1)
    cfg = distilled(cfg, tmp_path, channels=16)
    cfg.MODEL.DISTILLER.METHOD = method
    cfg.DATASETS.TRAIN_SECOND_IMAGES = "somewhere"
    return build_model(cfg), cfg


def step(model, batch, iteration=0):
    with EventStorage(iteration):
        return model(copy.deepcopy(batch))


def calls(backbone):
    """A list that grows by each forward's input."""
    seen = []
    backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


def without_second(batch):
    return [{k: v for k, v in x.items() if k != "second_image"} for x in batch]


def second(batch):
    return [{"image": x["second_image"]} for x in batch]


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_each_side_sees_what_it_would_see_alone(arch, tiny_cfg, tmp_path, make_batch):
    model, cfg = make(tiny_cfg(arch), tmp_path)
    batch = make_batch()
    losses = step(model, batch)
    given = model.distillation.given
    names = list(given.student)
    assert list(given.second_view.student) == list(given.second_view.teacher) == names
    student = copy.deepcopy(model.student)
    teacher = build_model(tiny_cfg(arch)).eval()
    teacher.load_state_dict(torch.load(tmp_path / "teacher.pth", weights_only=True)["model"])
    with torch.no_grad():
        for inputs, sides in (
            (batch, (given.student, given.teacher)),
            (second(batch), (given.second_view.student, given.second_view.teacher)),
        ):
            for detector, maps in zip((student, teacher), sides):
                wanted = detector.backbone(detector.preprocess_image(inputs).tensor)
                for name in names:
                    assert torch.equal(maps[name], wanted[name])
    assert all(x.requires_grad for x in given.second_view.student.values())
    assert not any(x.requires_grad for x in given.second_view.teacher.values())
    assert given.second_view.student["p4"].shape == given.student["p4"].shape
    assert losses["loss_twice_distance"] > 0
    losses["loss_twice_distance"].backward()
    assert next(model.student.backbone.bottom_up.parameters()).grad.abs().sum() > 0


def test_the_first_view_and_its_losses_do_not_notice(tiny_cfg, tmp_path, make_batch):
    both, _ = make(tiny_cfg(), tmp_path, "FGD+Twice")
    alone, _ = make(tiny_cfg(), tmp_path, "FGD")
    alone.load_state_dict(
        {k: v for k, v in both.state_dict().items() if "fgd" not in k}
        | {k.replace("methods.fgd.", ""): v for k, v in both.state_dict().items() if "fgd" in k}
    )
    wanted, found = step(alone, make_batch()), step(both, make_batch())
    assert {k for k in found if k not in wanted} == {"loss_twice_distance"}
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    with pytest.raises(RuntimeError, match="features were taken"):
        both._tap.pop()  # nothing is kept alive


def test_it_is_what_heads_read_whatever_is_distilled(tiny_cfg, tmp_path, make_batch):
    student = reppoints(tiny_cfg)
    student.MODEL.FPN.OUT_CHANNELS = 32
    cfg = pair(tmp_path, student, student)
    cfg.MODEL.DISTILLER.METHOD = "Twice"
    cfg.DATASETS.TRAIN_SECOND_IMAGES = "somewhere"
    for kind in ("auto", "output"):
        cfg.MODEL.DISTILLER.FEATURES = kind
        model = build_model(cfg)
        step(model, make_batch())
        given, batch = model.distillation.given, make_batch()
        images = [model.student.preprocess_image(x).tensor for x in (batch, second(batch))]
        with torch.no_grad():
            first, again = (model.student.backbone(x) for x in images)
        assert torch.equal(given.second_view.student["p4"], again["p4"])
        assert torch.equal(given.student["p4"], first["p4"]) == (kind == "output")
        mean = given.second_view.teacher["p4"].mean(dim=(2, 3))
        assert mean.abs().max() < 5  # normalised, as the teacher's own heads read it


def test_it_costs_nothing_where_it_is_not_asked_for_or_does_not_count(
    tiny_cfg, tmp_path, make_batch
):
    batch = make_batch()
    for method, node, iteration, runs in (
        ("FGD", {}, 0, 1),
        ("Twice", {}, 0, 2),
        ("Twice", {"START": 5}, 0, 1),
        ("Twice", {"START": 5}, 5, 2),
    ):
        cfg = tiny_cfg()
        cfg.MODEL.DISTILLER.SCHEDULE.update(node)
        model, cfg = make(cfg, tmp_path, method)
        seen = calls(model.student.backbone), calls(model.teacher.backbone)
        losses = step(model, batch, iteration)
        taught = 0 if node and iteration < 5 else runs
        assert [len(x) for x in seen] == [runs, taught]
        assert wants_second_images(cfg) == (method == "Twice")
        if method == "FGD":
            assert "loss_fgd_attention" in losses


def test_after_the_phase_it_is_none_and_the_term_is_zero(tiny_cfg, tmp_path, make_batch):
    cfg = tiny_cfg()
    cfg.INPUT.PLAIN_FROM = 3
    model, _ = make(cfg, tmp_path)
    plain = without_second(make_batch())
    for missing in (plain, [make_batch()[0], plain[1]]):
        with pytest.raises(ValueError, match="samples have no 'second_image'; build their"):
            step(model, missing, 2)
    seen = calls(model.student.backbone)
    losses = step(model, plain, 3)
    assert len(seen) == 1 and model.distillation.given.second_view is None
    assert losses["loss_twice_distance"] == 0 and model.table == {}
    sum(losses.values()).backward()
    with torch.no_grad():
        assert model.eval()(plain)[0]["instances"] is not None


def test_live_batch_norms_see_both(tiny_cfg, tmp_path, make_batch):
    cfg = tiny_cfg()
    cfg.MODEL.FPN.NORM = "BN"
    model, _ = make(cfg, tmp_path)
    norm = model.student.backbone.fpn_output3.norm
    inputs = []
    norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    losses = step(model.train(), make_batch())
    assert len(inputs) == 2 and norm.num_batches_tracked == 2
    mean = torch.zeros(16)
    for x in inputs:  # the first images first
        mean = 0.9 * mean + 0.1 * x.mean(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean)
    sum(losses.values()).backward()
    assert norm.weight.grad.isfinite().all() and norm.weight.grad.any()


def test_ddp_reduces_both_forwards_of_a_parameter(tiny_cfg, tmp_path, make_batch):
    """In a world of one its gradients are those of the model alone, during the phase and after."""
    cfg = tiny_cfg()
    cfg.INPUT.PLAIN_FROM, cfg.MODEL.FPN.NORM = 2, "BN"
    alone, _ = make(cfg, tmp_path)
    model = copy.deepcopy(alone)
    address = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for iteration in range(4):
            batch = make_batch() if iteration < 2 else without_second(make_batch())
            gradients = []
            for side, whole in ((alone, alone), (parallel, model)):
                side.zero_grad()
                losses = step(side, batch, iteration)
                assert (losses["loss_twice_distance"] > 0) == (iteration < 2)
                sum(losses.values()).backward()
                gradients.append({k: p.grad for k, p in whole.named_parameters()})
            for name, wanted in gradients[0].items():
                torch.testing.assert_close(gradients[1][name], wanted, msg=name)
    finally:
        dist.destroy_process_group()


def test_a_config_without_a_folder_is_refused_in_one_line(tiny_cfg, tmp_path):
    cfg = distilled(tiny_cfg(), tmp_path, channels=16)
    cfg.MODEL.DISTILLER.METHOD = "FGD+Twice"
    with pytest.raises(UserError) as error:
        build_model(cfg)
    text = str(error.value)
    assert text.startswith(
        "MODEL.DISTILLER.METHOD Twice needs maps of a second image of each training image: "
        "DATASETS.TRAIN_SECOND_IMAGES names no folder. These work here: "
    )
    working = text.split("These work here: ")[1].split(", ")
    assert "\n" not in text and "FGD" in working and "Twice" not in working
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"  # the plain student asks for nothing
    assert not wants_second_images(cfg)


def test_levels_of_one_method_alone():
    view = SecondView({"p3": 1, "p4": 2}, {"p3": 3, "p4": 4, "p5": 5})
    assert view.only(["p4", "p5"]) == SecondView({"p4": 2}, {"p4": 4, "p5": 5})


def test_a_run_resumed_across_the_end_of_the_phase_is_bit_equal(tmp_path):
    """Eight steps, the second images of six, interrupted after four."""
    opts = ("INPUT.SAMPLE_SPECIFIC.ENABLED", True, "INPUT.SAMPLE_SPECIFIC.NOISE_PROB", 1.0)
    opts += ("INPUT.PLAIN_FROM", 6, "INPUT.SAMPLE_SPECIFIC.SMALL_AREA", 721.0)
    cfg = distilled(training_cfg(tmp_path, opts=opts), tmp_path, channels=16)
    cfg.MODEL.DISTILLER.METHOD = "FGD+Twice"
    cfg.MODEL.DISTILLER.FACTOR = 0.01  # of an untrained teacher
    train(cfg)
    first = Path(cfg.OUTPUT_DIR)
    begin_second(cfg, tmp_path / "second")
    assert train(cfg, resume=True).start_iter == 4
    assert_same_end(first, tmp_path / "second")
    plain = cfg.clone()
    plain.INPUT.PLAIN_FROM, plain.OUTPUT_DIR = 0, str(tmp_path / "third")
    train(plain)
    ends = [load(folder / "model_final.pth")["model"] for folder in (first, tmp_path / "third")]
    assert not all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_the_doctor_measures_each_batch_in_its_own_iteration(tmp_path):
    cfg = distilled(training_cfg(tmp_path, opts=("INPUT.PLAIN_FROM", 2)), tmp_path, channels=16)
    cfg.MODEL.DISTILLER.METHOD = "Twice"
    batches = FGDTrainer.build_train_loader(cfg).first_batches(3)
    assert ["second_image" in x[0] for x in batches] == [True, True, False]
    torch.manual_seed(1)
    model = build_model(cfg)
    whole = measure(model, batches).levels["p3"]["twice_distance"]
    parts = [measure(model, [x]).levels["p3"]["twice_distance"] for x in batches[:2]]
    assert whole == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert "second_image" not in build_train_stream(cfg).first_batches(1)[0][0]


def test_the_bench_draws_them_and_measures_a_step_of_the_phase(tiny_cfg, tmp_path):
    _, cfg = make(tiny_cfg(), tmp_path)
    cfg.INPUT.PLAIN_FROM = 1
    work = build_workload(cfg, (64, 64), 1, 2)
    seen = calls(work.distiller.student.backbone)
    assert step(work.distiller, work.batch, 5)["loss_twice_distance"] > 0
    assert len(seen) == 2 and not torch.equal(*seen)
    assert not any(x.startswith("second") for x in draw_batch((64, 64), 1, 2, 3)[0])
