"""The method of docs/methods.md, which the product knows nothing of, through all of the product.

As an arm of a study it is in tests/fgd/study/test_end_to_end.py.
"""

import json
import shutil

import onnx
import pytest
import torch
from detectron2.utils.logger import setup_logger

from deploy.export import main as export
from fgd.bench.__main__ import main as bench
from fgd.cli import main as train_net
from fgd.config import get_fgd_cfg
from fgd.visualize.__main__ import main as visualize
from tests.fgd.doctor.clinic import student_cfg, train_teacher, write_config
from tests.fgd.study.methods import toy_installed
from tests.fgd.training import assert_equal


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The class, from an installed package as far as this process and its children can tell."""
    with toy_installed(tmp_path_factory.mktemp("site")) as found:
        yield found


@pytest.fixture(scope="module")
def config(toy, tmp_path_factory):
    """A config file of four steps under a teacher that has learnt the data; OUTPUT_DIR beside."""
    folder = tmp_path_factory.mktemp("toy")
    cfg = student_cfg(folder)
    cfg.MODEL.FPN.OUT_CHANNELS = 24
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(train_teacher(folder))
    cfg.MODEL.DISTILLER.METHOD = "Toy"
    cfg.MODEL.DISTILLER.PICTURE_PERIOD = 1
    cfg.MODEL.DISTILLER.SCHEDULE.START = 1  # a step at factor 0
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 4, (3,), 2
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 50
    cfg.DOCTOR.BATCHES = 1
    return write_config(cfg, folder / "toy.yaml")


@pytest.fixture(scope="module")
def run(config):
    """Folder of the finished run, begun with --balance."""
    code = train_net(["--config-file", str(config), "--balance"])
    setup_logger.cache_clear()
    assert code == 0
    return config.parent / "out"


def test_the_config_has_its_keys_and_checks_them(toy, config, capsys):
    node = get_fgd_cfg().MODEL.DISTILLER.TOY
    assert dict(node) == {"DISTANCE_WEIGHT": 1.0}
    words = ["--config-file", str(config), "MODEL.DISTILLER.TOY.DISTANCE_WEIGHT"]
    assert train_net([*words, "-1.0"]) == 2
    assert "MODEL.DISTILLER.TOY.DISTANCE_WEIGHT: -1.0 is not a finite" in capsys.readouterr().err
    words[-1] = "MODEL.DISTILLER.METHOD"
    assert train_net([*words, "Toys"]) == 2
    assert "'Toys' is unknown; there is " in capsys.readouterr().err


def test_it_is_examined_balanced_and_trained(run):
    report = json.loads((run / "doctor.json").read_text())
    verdicts = {x["name"]: x["verdict"] for x in report["findings"]}
    assert verdicts["gradients"] == verdicts["optimizer"] == verdicts["levels"] == "ok"
    losses = report["losses"]["distillation_at_factor_1"]
    assert list(losses) == ["p3", "p4", "p5", "p6", "p7"] and list(losses["p3"]) == ["toy_distance"]
    assert report["losses"]["factor"] == report["losses"]["suggested_factor"] != 1
    lines = [json.loads(x) for x in (run / "metrics.json").read_text().splitlines()]
    logged = {k: v for line in lines for k, v in line.items()}
    assert logged["loss_toy_distance"] > 0 and logged["distill/p7"] > 0
    final = torch.load(run / "model_final.pth", weights_only=True)
    assert final["distiller"]["scale"] != 1 and not [k for k in final["model"] if "scale" in k]
    assert "Distillation is ON: Toy on p3, p4" in (run / "log.txt").read_text()


def test_a_resumed_run_is_bit_equal(config, run, tmp_path):
    for name in ("model_0000001.pth", "config.yaml"):
        shutil.copy(run / name, tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    words = ["--config-file", str(tmp_path / "config.yaml"), "--resume"]
    assert train_net([*words, "OUTPUT_DIR", str(tmp_path)]) == 0
    setup_logger.cache_clear()
    ends = [torch.load(x / "model_final.pth", weights_only=True) for x in (run, tmp_path)]
    for end in ends:
        del end["full_config"], end["config"]
    assert_equal(*ends)


def test_its_pictures_are_drawn(run, tmp_path, capsys):
    image = run.parent / "data" / "images" / "0.png"
    words = [str(run / "model_final.pth"), str(image), "--output", str(tmp_path)]
    assert visualize(words) == 0
    assert (tmp_path / "0.png").stat().st_size > 10_000


def test_its_step_is_measured(config, tmp_path):
    words = ["step", "--config-file", str(config), "--size", "64", "64", "--batch", "1"]
    words += ["--boxes", "2", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    assert bench([*words, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["teachers"][0]["change"] == {"toy_distance": 0.0}


def test_its_student_is_exported_without_it(run, capsys):
    assert export([str(run / "model_final.pth"), "--size", "64", "64"]) == 0
    content = (run / "model_final_onnx" / "model.onnx").read_bytes()
    for word in (b"toy", b"Toy", b"istill"):
        assert word not in content
    assert not [x for x in onnx.load_from_string(content).graph.initializer if "scale" in x.name]
