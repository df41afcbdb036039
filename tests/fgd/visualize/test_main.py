import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fgd.engine.trainer import FGDTrainer
from fgd.errors import UserError
from fgd.visualize import record_pictures
from fgd.visualize.__main__ import detections, find_records, main, unique_names
from fgd.visualize.run import load_inputs, open_run
from tests.fgd.training import distilled, training_cfg


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a distilled run of one step: data/, teacher.pth, out/model_final.pth."""
    folder = tmp_path_factory.mktemp("run")
    cfg = distilled(training_cfg(folder, opts=("SOLVER.MAX_ITER", 1)), folder)
    cfg.MODEL.DISTILLER.LEVELS = ["p3", "p5"]
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # so that an untrained student finds something
    Path(cfg.OUTPUT_DIR).mkdir()
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return folder


def call(run, *args):
    return main([str(run / "out" / "model_final.pth"), *map(str, args)])


def test_ground_truth_of_a_dataset(run, tmp_path, capsys):
    image = run / "data" / "images" / "0.png"
    json_file = run / "data" / "data.json"
    assert call(run, image, "--dataset", json_file, "--output", tmp_path / "maps") == 0
    assert "0.png (2 boxes, ground truth)" in capsys.readouterr().out
    assert Image.open(tmp_path / "maps" / "0.png").size[0] > 1000
    with np.load(tmp_path / "maps" / "0.npz") as arrays:
        # 96x64 at a test size of 64: as it is.
        assert arrays["boxes"].tolist() == [[4, 6, 28, 36], [24, 6, 48, 36]]
        assert arrays["image_size"].tolist() == arrays["padded_size"].tolist() == [64, 96]
        distiller, cfg = open_run(str(run / "out" / "model_final.pth"))
        record = find_records(str(json_file), [str(image)])[str(image)]
        pictures = record_pictures(distiller, load_inputs(str(image), cfg, record)).pictures
        names = ("foreground", "background", "teacher attention", "student attention")
        for level in ("p3", "p5"):
            for name in (*names, "difference"):
                stored = arrays[f"{level}/{name.replace(' ', '_')}"]
                assert np.array_equal(stored, pictures[level][name].values)
        assert len(arrays.files) == 2 * 5 + 3


def test_detections_without_a_dataset(run, tmp_path, capsys, monkeypatch):
    image = run / "data" / "images" / "1.png"
    distiller, cfg = open_run(str(run / "out" / "model_final.pth"))
    inputs = load_inputs(str(image), cfg)
    found = distiller([{"image": inputs["image"]}])[0]["instances"]
    score = found.scores.median().item()
    own = detections(distiller, inputs, score)
    assert 0 < len(own) < len(found)
    assert torch.equal(own.gt_boxes.tensor, found.pred_boxes.tensor[found.scores >= score])
    output = ["--output", tmp_path / "maps", "--score", score]
    assert call(run, image, *output) == 0
    with np.load(tmp_path / "maps" / "1.npz") as arrays:
        assert np.array_equal(arrays["boxes"], own.gt_boxes.tensor.numpy())
        assert arrays["p3/foreground"].max() > 0
    assert call(run, image, "--output", tmp_path / "none", "--score", 1.1) == 0
    assert "1.png (0 boxes, detections)" in capsys.readouterr().out


def test_the_teacher_may_lie_elsewhere_but_is_the_same_file(run, tmp_path, capsys):
    image, teacher = run / "data" / "images" / "0.png", run / "teacher.pth"
    moved = tmp_path / "moved.pth"
    teacher.rename(moved)
    try:
        assert call(run, image) == 2
        assert "is not there; say where it is with --teacher" in capsys.readouterr().err
        output = ["--output", tmp_path / "maps"]
        assert call(run, image, "--teacher", moved, *output) == 0
        other = torch.load(moved, weights_only=True)
        next(iter(other["model"].values())).add_(1)
        torch.save(other, tmp_path / "other.pth")
        assert call(run, image, "--teacher", tmp_path / "other.pth") == 2
        assert "is not the one that taught this student" in capsys.readouterr().err
        assert call(run, image, "--teacher", moved, "--teacher-config", "x.yaml") == 2
        assert "say where it is with --teacher-config" in capsys.readouterr().err
    finally:
        moved.rename(teacher)


def test_other_files_are_refused(run, tmp_path, capsys):
    assert main([str(run / "teacher.pth"), "x.png"]) == 2
    assert "is no checkpoint of a distilled training" in capsys.readouterr().err
    assert call(run, tmp_path / "missing.png") == 2
    assert "image " in capsys.readouterr().err
    torn = tmp_path / "torn.png"
    torn.write_bytes((run / "data" / "images" / "0.png").read_bytes()[:50])
    assert call(run, torn) == 2
    assert str(torn) in capsys.readouterr().err


def test_an_image_has_exactly_one_entry(tmp_path):
    images = [
        {"id": i, "file_name": name, "height": 9, "width": 9}
        for i, name in enumerate(["a.png", "sub/a.png", "b.png"])
    ]
    boxes = [[0, 0, 4, 4], [0, 0, 0, 4]]  # the second has no area
    annotations = [{"image_id": 2, "category_id": 1, "bbox": box} for box in boxes]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "cell"}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    (record,) = find_records(str(path), ["photos/b.png"]).values()
    assert [x["bbox"] for x in record["annotations"]] == [[0, 0, 4, 4]]
    for name, count in {"c.png": 0, "sub/a.png": 2}.items():
        with pytest.raises(UserError, match=f"{name} is {count} times among the images"):
            find_records(str(path), [name])
    path.write_text('{"images": 3}')
    with pytest.raises(UserError, match="is not COCO format"):
        find_records(str(path), ["a.png"])


def test_boxes_of_another_image_are_refused(run, tmp_path, capsys):
    data = json.loads((run / "data" / "data.json").read_text())
    data["images"][0]["width"] += 1
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    assert call(run, run / "data" / "images" / "0.png", "--dataset", path) == 2
    assert re.search("Mismatched image shape.*0.png", capsys.readouterr().err)


def test_names_are_unique():
    assert unique_names(["a/x.png", "b/x.jpg", "y.png", "c/x.png"]) == ["x", "x_2", "y", "x_3"]
