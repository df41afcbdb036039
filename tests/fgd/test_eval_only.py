"""--eval-only: whose classes, and which images, the weights were trained for."""

import json
import logging

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import nn

from fgd import job
from fgd.config import get_fgd_cfg, student_config
from fgd.data.checks import matched_by_name
from fgd.data.datasets import register_from_config
from fgd.errors import UserError
from fgd.trained_with import other_config

from .training import CLASSES, write_dataset


class Oracle(nn.Module):
    """Finds every box, and calls it by the label that it has in the order of `CLASSES`."""

    def __init__(self, coco):
        super().__init__()
        self.weight, self.coco = nn.Parameter(torch.zeros(1)), coco

    def forward(self, inputs):
        return [{"instances": self._found(x["image_id"], x["height"], x["width"])} for x in inputs]

    def _found(self, image_id, height, width):
        own = [a for a in self.coco["annotations"] if a["image_id"] == image_id]
        found = Instances((height, width))
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        found.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
        found.scores = torch.ones(len(own))
        found.pred_classes = torch.tensor([a["category_id"] - 1 for a in own])
        return found


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """A function: names of the dataset's categories by id, changes of the config → results."""
    coco = json.loads(write_dataset(tmp_path / "data").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    monkeypatch.setattr(job, "build_model", lambda cfg: Oracle(coco).eval())

    def evaluate(categories, *opts, classes=tuple(CLASSES), trained=None):
        ids = {name: number for number, name in categories.items()}
        entries = [
            {**a, "category_id": ids.get(names[a["category_id"]], a["category_id"])}
            for a in coco["annotations"]
        ]
        own = [{"id": number, "name": name} for number, name in categories.items()]
        path = tmp_path / "data" / f"{'-'.join(categories.values())}.json"
        path.write_text(json.dumps({**coco, "annotations": entries, "categories": own}))
        cfg = get_fgd_cfg()
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CLASSES = "RetinaNet", 3
        cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.DEVICE = 64, "cpu"
        config = student_config(cfg).dump() if trained is None else trained
        content = {"model": {"weight": torch.zeros(1)}, "classes": list(classes), "config": config}
        torch.save(content, tmp_path / "m.pth")
        cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(tmp_path / "m.pth"), str(tmp_path / "out")
        cfg.DATASETS.JSON.TEST, cfg.DATALOADER.NUM_WORKERS = str(path), 0
        cfg.merge_from_list(list(opts))
        job.evaluate(register_from_config(cfg, ("TEST",)))
        return json.loads((tmp_path / "out" / "results.json").read_text())["bbox"]

    return evaluate


def test_the_classes_of_the_weights_decide_whatever_their_numbers(evaluated, caplog):
    first = evaluated({1: "square", 2: "disc", 3: "cross"})
    assert first["AP"] == first["AP-disc"] == pytest.approx(100.0)
    with caplog.at_level(logging.WARNING):
        other = evaluated({5: "cross", 2: "square", 9: "disc"})
    assert other == first
    assert "classes are matched by name, the model has them in another order" in caplog.text


def test_other_classes_are_refused_before_an_image_is_read(evaluated):
    with pytest.raises(UserError, match=r"only in the model \['cross', 'disc', 'square'\]"):
        evaluated({1: "cat", 2: "dog", 3: "bird"})


def test_weights_without_names_are_taken_for_the_datas(evaluated):
    assert evaluated({1: "a", 2: "b", 3: "c"}, classes=())["AP"] == pytest.approx(100.0)


def test_labels_are_as_before_afterwards(tmp_path):
    cfg = get_fgd_cfg()
    cfg.DATASETS.JSON.TEST = str(write_dataset(tmp_path))
    cfg = register_from_config(cfg, ("TEST",))
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    labels = {1: 0, 2: 1, 3: 2}
    with pytest.raises(ZeroDivisionError), matched_by_name(cfg, ["cross", "square", "disc"]):
        assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 1: 1, 2: 2}
        raise ZeroDivisionError
    assert metadata.thing_dataset_id_to_contiguous_id == labels


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("INPUT.FORMAT", "RGB", "INPUT.FORMAT 'RGB' (trained with 'BGR')"),
        ("MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0], "MODEL.PIXEL_MEAN [0.0, 0.0, 0.0] (trained with"),
        ("MODEL.PIXEL_STD", [9, 9, 9], "MODEL.PIXEL_STD [9, 9, 9] (trained with [1.0, 1.0, 1.0])"),
    ],
)
def test_images_of_another_kind_are_refused(key, value, said, evaluated):
    with pytest.raises(UserError) as caught:
        evaluated({1: "square", 2: "disc", 3: "cross"}, key, value)
    assert "m.pth was trained with other images than this config makes: " in str(caught.value)
    assert said in str(caught.value)


def test_other_sizes_are_said(evaluated, caplog):
    with caplog.at_level(logging.WARNING):
        evaluated({1: "square", 2: "disc", 3: "cross"}, "INPUT.MAX_SIZE_TEST", 80)
    assert (
        "m.pth is used with another config than it was trained with: INPUT.MAX_SIZE_TEST 80 "
        "(trained with 1333)" in caplog.text
    )


def test_what_an_older_config_lacks_was_as_its_default():
    cfg = get_fgd_cfg()
    assert other_config("m.pth", None, cfg) == other_config("m.pth", "VERSION: 2", cfg) == ""
    cfg.MODEL.RETINANET.NMS_THRESH_TEST = 0.4
    cfg.SOLVER.BASE_LR = 7.0
    assert other_config("m.pth", "VERSION: 2", cfg) == (
        "m.pth is used with another config than it was trained with: "
        "MODEL.RETINANET.NMS_THRESH_TEST 0.4 (trained with 0.5)"
    )
