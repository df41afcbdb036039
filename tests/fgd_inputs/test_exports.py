"""What annotation tools export is read, trained on, evaluated alike everywhere, and exported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

import deploy.evaluate
import deploy.export
import deploy.predict
from deploy.checks.tiny import tiny_cfg
from deploy.coco_ap import coco_metrics
from deploy.coco_data import load_dataset
from deploy.evaluate import evaluate_graph
from deploy.runtime import OrtDetector
from fgd.data.datasets import register_from_config
from fgd.engine.evaluation import build_evaluator
from fgd.engine.trainer import FGDTrainer
from fgd.visualize.__main__ import find_records
from fgd_inputs.coco import read_coco
from tests.deploy.coco_files import SIZES
from tests.deploy.fake_graph import CLASSES, write_fake_graph

from .exported import EXPORTS, true_boxes, unpack

tools = pytest.mark.parametrize("tool", EXPORTS)


def tiny(path, folder):
    """Trains two steps of two images on the export, and tests on it."""
    cfg = tiny_cfg("RetinaNet")
    cfg.DATASETS.JSON.TRAIN = cfg.DATASETS.JSON.TEST = str(path)
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.MAX_ITER = 2
    cfg.SOLVER.STEPS = ()
    cfg.SEED = 1
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = "AdamW", 1e-3, 10
    cfg.OUTPUT_DIR = str(folder / "out")
    return register_from_config(cfg)


@tools
def test_it_is_read_as_what_was_drawn(tool, tmp_path):
    path, export = unpack(tool, tmp_path), EXPORTS[tool]
    found = read_coco(str(path))
    assert [image["file"] for image in found.images] == [str(tmp_path / x) for x in export.pictures]
    assert [(image["height"], image["width"]) for image in found.images] == list(SIZES)
    assert tuple(found.class_names) == CLASSES
    assert tuple(found.notes) == export.notes and found.warnings == []
    assert found.dropped_text() == ("1 boxes dropped (1 points alone)" if tool == "via" else "")
    boxes = np.array([entry["bbox"] for entry in found.annotations]).reshape(3, 3, 4)
    boxes[..., 2:] += boxes[..., :2]
    np.testing.assert_allclose(boxes, true_boxes(), atol=1e-9)
    ids = found.category_ids
    assert [entry["category_id"] for entry in found.annotations] == [*ids, *ids, *ids]
    areas = [entry["area"] for entry in found.annotations]
    sizes = np.array(true_boxes()).reshape(9, 4)
    expected = (sizes[:, 2] - sizes[:, 0]) * (sizes[:, 3] - sizes[:, 1])
    np.testing.assert_allclose(areas, expected, atol=1)  # labelme2coco cuts; masks are of pixels
    assert found.crowds == (tool == "datumaro")


def evaluate_in_training(cfg, boxes):
    """AP of detections, boxes of each class on each image, by the evaluator of a training."""
    (name,) = cfg.DATASETS.TEST
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for record, found in zip(DatasetCatalog.get(name), boxes, strict=True):
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(found).reshape(-1, 4))
        instances.pred_classes = torch.arange(len(found))
        instances.scores = torch.full((len(found),), 0.9)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


@tools
def test_training_and_deployment_evaluate_it_alike(tool, tmp_path):
    path = unpack(tool, tmp_path)
    cfg, data = tiny(path, tmp_path), load_dataset(str(path))
    # Two of three objects found are precision 1 at 67 of COCO's 101 recalls.
    found = 100 * 67 / 101
    square = 100 if tool == "datumaro" else found  # whose third square is a crowd region
    perfect = true_boxes()
    for boxes, aps in ((perfect, [100] * 3), ([*perfect[:2], []], [found, square, found])):
        own = evaluate_in_training(cfg, boxes)
        results = [
            (np.array(x).reshape(-1, 4), np.full(len(x), 0.9), np.arange(len(x))) for x in boxes
        ]
        deployed = coco_metrics(data, CLASSES, results)
        assert own["AP"] == pytest.approx(np.mean(aps)) == deployed["AP"]
        assert [own[f"AP-{name}"] for name in CLASSES] == pytest.approx(aps)
        assert deployed["per_class"] == pytest.approx(dict(zip(CLASSES, aps)))
        for size in ("APs", "APm", "APl"):
            assert own[size] == pytest.approx(deployed[size], nan_ok=True)


@tools
def test_it_trains(tool, tmp_path):
    cfg = tiny(unpack(tool, tmp_path), tmp_path)
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load()
    trainer.train()
    assert trainer.iter == 2 and "bbox" in trainer.last_results
    assert np.isfinite(trainer.storage.latest()["total_loss"][0])


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """One that finds the nine objects exactly."""
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    write_fake_graph(path)
    return str(path)


@tools
def test_a_graph_that_finds_all_scores_100(tool, graph, tmp_path, capsys):
    path, report = unpack(tool, tmp_path), tmp_path / "report.json"
    options = ["--dataset", str(path), "--output", str(report)]
    assert deploy.evaluate.main([graph, *options]) == 0
    said = capsys.readouterr().out
    assert all(note in said for note in EXPORTS[tool].notes)
    assert json.loads(report.read_text())["metrics"]["AP"]["onnx"] == pytest.approx(100, abs=1e-3)


@tools
def test_predictions_and_pictures_find_its_images(tool, graph, tmp_path, capsys):
    path, export = unpack(tool, tmp_path), EXPORTS[tool]
    pictures = [str(tmp_path / name) for name in export.pictures]
    options = ["--output", str(tmp_path / "out"), "--score", "0", "--no-images"]
    options += ["--format", "coco", "--annotations", str(path)]
    assert deploy.predict.main([graph, *pictures, *options]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    data = load_dataset(str(path))
    ids = [image["id"] for image in data.images]
    assert sorted({str(x["image_id"]) for x in results}) == list(map(str, ids))
    assert {x["category_id"] for x in results} == set(data.category_ids(CLASSES))
    drawn = find_records(str(path), pictures)
    for picture, boxes in zip(pictures, true_boxes(), strict=True):
        found = np.array([x["bbox"] for x in drawn[picture]["annotations"]])
        found[:, 2:] += found[:, :2]
        np.testing.assert_allclose(found, boxes, atol=1e-9)


def test_a_student_trained_on_one_export_scores_the_same_on_all(tmp_path, capsys):
    """But on that with a crowd region, which is another truth."""
    cfg = tiny(unpack("roboflow", tmp_path / "roboflow"), tmp_path)
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 150, 0
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load()
    trainer.train()
    checkpoint = Path(cfg.OUTPUT_DIR, "model_final.pth")
    assert deploy.export.main([str(checkpoint)]) == 0, capsys.readouterr().err
    detector = OrtDetector(checkpoint.with_name("model_final_onnx") / "model.onnx")
    aps = {}
    for tool in EXPORTS:
        path = unpack(tool, tmp_path / "of" / tool)
        own = FGDTrainer.test(tiny(path, tmp_path), trainer.model)["bbox"]
        found, _ = evaluate_graph(detector, load_dataset(str(path)))
        aps[tool] = own["AP"], found["AP"]
    crowded, (trained, exported) = aps.pop("datumaro"), aps["cvat"]
    assert all(found == pytest.approx(aps["cvat"]) for found in aps.values())
    assert crowded != pytest.approx(aps["cvat"]) and trained > 1
    # With three pictures one pair of detections in another order is a fifth of a point.
    assert trained == pytest.approx(exported, abs=1)
