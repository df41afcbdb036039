import json
from pathlib import Path

import pytest
from PIL import Image

from fgd.errors import UserError
from fgd.study.arms import study_config
from fgd.study.examples import Example, best_detections, example_figure, right
from fgd.study.run import Run

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")


def thing(x, category=1, **more):
    return {"category_id": category, "bbox": [x, 0, 10, 10], **more}


def test_a_detection_is_right_where_it_finds_an_object_that_none_has_before():
    objects = [thing(0), thing(50), thing(80, 2)]
    found = [thing(1), thing(0), thing(52), thing(80), thing(87, 2), thing(82, 2)]
    assert right(found, objects) == [True, False, True, False, False, True]
    assert right(found, []) == [False] * 6 and right([], objects) == []


def test_as_many_of_the_best_as_there_are_objects():
    example = Example(7, Path("x.png"), [thing(0), thing(50)])
    scores = [(7, 0.1), (7, 0.5), (8, 0.9), (7, 0.3)]
    entries = [thing(0, image_id=image, score=score) for image, score in scores]
    assert [x["score"] for x in best_detections(entries, example)] == [0.5, 0.3]


def test_the_figure_has_a_row_per_image_and_a_column_per_run(tmp_path):
    truth = {"images": [], "annotations": [], "categories": [{"id": 4, "name": "a $disc$"}]}
    Image.new("RGB", (64, 48)).save(tmp_path / "x.png")
    for i in range(1, 12):
        truth["images"].append({"id": i, "file_name": "x.png", "width": 64, "height": 48})
        fields = {"id": i, "image_id": i, "area": 100, "iscrowd": int(i == 1)}
        truth["annotations"].append({**thing(i, 4), **fields})
    (tmp_path / "test.json").write_text(json.dumps(truth))
    cfg = study_config(CONFIG, {"DATASETS.JSON.TEST": str(tmp_path / "test.json")})
    run = Run("FGD", 0, CONFIG, tmp_path / "FGD_0", {})
    (run.folder / "inference").mkdir(parents=True)
    saved = run.folder / "inference" / "coco_instances_results.json"
    found = [thing(i, 4, image_id=i, score=0.5) for i in (2, 4, 6)]
    saved.write_text(json.dumps([*found, thing(40, 4, image_id=8, score=0.25)]))
    axes = example_figure([run], cfg).axes  # of the ten images with an object that is no crowd
    assert [axis.get_title() for axis in axes[:2]] == ["truth", "FGD, seed 0"]
    texts = [[x.get_text() for x in axis.texts] for axis in axes]
    assert texts[::2] == [[r"a \$disc\$"]] * 4
    assert texts[1::2] == [[r"a \$disc\$ 0.50"]] * 3 + [[r"a \$disc\$ 0.25"]]
    assert [line.get_linestyle() for axis in axes[1::2] for line in axis.lines] == ["-"] * 3 + [":"]
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="x.png"):
        example_figure([run], cfg)
