"""A method that looks at the student alone, without any teacher in the config or beside others'."""

import json
import shutil

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from fgd.bench.step import REST, STUDENT, WHOLE, Settings, measure
from fgd.bench.step_report import table
from fgd.cli import main as train_net
from fgd.config import load_config
from fgd.errors import UserError
from fgd.methods.method import METHOD_REGISTRY, Method
from fgd.study.plan import plan
from fgd.visualize.__main__ import main as visualize
from tests.fgd.doctor.clinic import student_cfg, write_config
from tests.fgd.training import assert_equal, distilled


@pytest.fixture(scope="module", autouse=True)
def methods():
    """Two that need no teacher: one of maps, one of regions."""

    @METHOD_REGISTRY.register()
    class Alone(Method):
        needs = frozenset({"maps"})
        terms = ("size",)

        def forward(self, batch):
            return {k: self.weigh({"size": x.square().mean()}) for k, x in batch.student.items()}

    @METHOD_REGISTRY.register()
    class RegionsAlone(Method):
        needs = frozenset({"regions"})
        terms = ("size",)

        def forward(self, batch):
            assert batch.regions.teacher is None
            return {"regions": self.weigh({"size": batch.regions.student.logits.square().mean()})}

    yield
    for name in ("Alone", "RegionsAlone"):
        METHOD_REGISTRY._obj_map.pop(name)


@pytest.fixture(scope="module")
def config(methods, tmp_path_factory):
    """A config file of four steps; OUTPUT_DIR beside."""
    folder = tmp_path_factory.mktemp("alone")
    cfg = student_cfg(folder)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DISTILLER.METHOD = "Distiller", "Alone"
    cfg.MODEL.DISTILLER.PICTURE_PERIOD = 2
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 4, (3,), 2
    cfg.DOCTOR.BATCHES = 1
    return write_config(cfg, folder / "alone.yaml")


def run_command(words):
    code = train_net(words)
    setup_logger.cache_clear()
    return code


@pytest.fixture(scope="module")
def run(config):
    """Folder of the finished run."""
    assert run_command(["--config-file", str(config)]) == 0
    return config.parent / "out"


@pytest.mark.parametrize("form", ["brief", "full"])
def test_the_doctor_asks_for_no_teacher(form, config, run, tmp_path):
    folder = run
    if form == "full":
        folder = tmp_path
        words = ["--config-file", str(config), "--doctor", "OUTPUT_DIR", str(folder)]
        assert run_command(words) == 0
    report = json.loads((folder / "doctor.json").read_text())
    assert report["form"] == form
    verdicts = {x["name"]: x["verdict"] for x in report["findings"]}
    assert verdicts["gradients"] == verdicts["optimizer"] == "ok"
    assert not {"weights", "frozen", "quality", "teacher_classes"} & verdicts.keys()


def test_it_is_saved_and_resumed_bit_by_bit(run, tmp_path):
    ends = [torch.load(run / "model_final.pth", weights_only=True)]
    assert ends[0]["teacher"] is None
    assert "student RetinaNet, no teacher" in (run / "log.txt").read_text()
    for name in ("model_0000001.pth", "config.yaml"):
        shutil.copy(run / name, tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    words = ["--config-file", str(tmp_path / "config.yaml"), "--resume"]
    assert run_command([*words, "OUTPUT_DIR", str(tmp_path)]) == 0
    ends.append(torch.load(tmp_path / "model_final.pth", weights_only=True))
    for end in ends:
        del end["full_config"], end["config"]
    assert_equal(*ends)


def test_pictures_are_the_students_alone(run, tmp_path):
    image = run.parent / "data" / "images" / "0.png"
    words = [str(run / "model_final.pth"), str(image), "--output", str(tmp_path)]
    assert visualize(words) == 0
    assert (tmp_path / "0.png").stat().st_size > 5_000


def test_a_study_has_no_teacher_to_train_or_wait_for(config, tmp_path):
    arms = ["student", "distil", "student-long"]
    runs = plan(str(config), "", arms, [0], tmp_path, {})
    assert [x.arm for x in runs] == arms
    assert "MODEL.DISTILLER.TEACHER.WEIGHTS" not in runs[1].opts and runs[1].needs == ()
    with pytest.raises(UserError, match=r"no teacher for inherit: give"):
        plan(str(config), "", ["distil", "inherit", "inherit+distil"], [0], tmp_path, {})
    runs = plan(str(config), "teacher.yaml", ["distil", "inherit"], [0], tmp_path, {})
    assert [x.needs for x in runs] == [(), (), ("teacher",)]


def test_its_step_is_measured_without_a_teachers_row(config):
    cfg = load_config(str(config))
    found = measure(cfg, Settings((64, 64), batch=1, boxes=2, rounds=1, threads=1))
    parts = {x["part"]: x["median_ms"] for x in found["parts"]}
    assert list(parts) == [STUDENT, REST, WHOLE]
    assert parts[STUDENT] + parts[REST] == pytest.approx(parts[WHOLE])
    assert found["over_parts"] == pytest.approx(parts[WHOLE] / parts[STUDENT])
    assert found["teachers"] == [] and found["settings"]["teacher"] == "none"
    assert "| teacher forward" not in table(found)


@pytest.mark.parametrize(
    ("method", "name", "terms"),
    [
        ("FGD+Alone", "alone", 5),
        ("Alone+FGD", "alone", 5),
        ("FGD+RegionsAlone", "regionsalone", 5),
        ("RegionsAlone", "regionsalone", 1),
    ],
)
def test_beside_a_method_with_a_teacher_it_has_what_it_has_alone(
    method, name, terms, tiny_cfg, tmp_path, make_batch
):
    """The teacher, a RetinaNet, has no regions, and its p3 teaches FGD only."""
    cfg = distilled(tiny_cfg("GeneralizedRCNN"), tmp_path, "RetinaNet")
    cfg.MODEL.DISTILLER.METHOD, cfg.MODEL.DISTILLER.LEVELS = method, ["p3", "p5"]
    if "FGD" not in method:
        cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = ""
    model = build_model(cfg)
    assert (model.teacher is None) == ("FGD" not in method)
    if model.teacher is not None:
        assert list(model.teacher.parts) == ["backbone"]
    with EventStorage():
        losses = model(make_batch())
    own = {k: v for k, v in losses.items() if k in model.distillation.loss_names}
    assert len(own) == terms and all(value.isfinite() for value in own.values())
    assert own[f"loss_{name}_size"] > 0
