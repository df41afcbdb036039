import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm

from fgd.config import get_fgd_cfg
from fgd.data import datasets
from fgd.data.datasets import coco_ground_truth, register_from_config, test_dataset
from fgd.errors import UserError
from fgd.processes.launch import launch
from tests.fgd_inputs.coco_files import coco_dict, write_coco


def json_cfg(folder, coco=None, **keys):
    cfg = get_fgd_cfg()
    cfg.OUTPUT_DIR = str(folder / "output")
    path = write_coco(folder, coco or coco_dict())
    cfg.DATASETS.JSON.TRAIN = cfg.DATASETS.JSON.TEST = path
    for key, value in keys.items():
        cfg.DATASETS.JSON[key] = value
    return cfg


def shapes_cfg(folder, **keys):
    cfg = get_fgd_cfg()
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_train",), ("shapes_test",)
    cfg.DATASETS.SHAPES.TRAIN_IMAGES, cfg.DATASETS.SHAPES.TEST_IMAGES = 5, 3
    for key, value in keys.items():
        cfg.DATASETS.SHAPES[key] = value
    return cfg


def image_ids(name):
    return [record["image_id"] for record in DatasetCatalog.get(name)]


def test_json_files_become_datasets_by_config_keys_alone(tmp_path):
    cfg = json_cfg(tmp_path, coco_dict(classes=("zebra", "ant"), category_ids=(90, 7)))
    cfg.freeze()
    registered = register_from_config(cfg)
    (name,) = registered.DATASETS.TRAIN
    assert cfg.DATASETS.TRAIN == ("shapes_train",) and registered.is_frozen()
    assert name.startswith("labels_")
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["ant", "zebra"]
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 90: 1}
    assert metadata.coco_file.path == cfg.DATASETS.JSON.TRAIN
    first = DatasetCatalog.get(name)[0]
    assert first["file_name"] == str(tmp_path / "images" / "0.png")
    (annotation,) = first["annotations"]
    assert annotation["category_id"] == 1 and annotation["bbox"] == [4.0, 6.0, 20.0, 10.0]
    assert annotation["bbox_mode"] == BoxMode.XYWH_ABS


def test_registering_again_changes_nothing(tmp_path):
    once = register_from_config(json_cfg(tmp_path))
    before = len(DatasetCatalog.list())
    assert register_from_config(once) == once
    assert len(DatasetCatalog.list()) == before


def test_files_of_one_name_or_one_place_never_share_a_dataset(tmp_path):
    names = [
        register_from_config(json_cfg(tmp_path / "a")).DATASETS.TRAIN,
        register_from_config(json_cfg(tmp_path / "b")).DATASETS.TRAIN,
        register_from_config(json_cfg(tmp_path / "a", coco_dict(images=2))).DATASETS.TRAIN,
        register_from_config(
            json_cfg(tmp_path / "a", coco_dict(images=2), TRAIN_LIMIT=1)
        ).DATASETS.TRAIN,
    ]
    assert len(set(names)) == 4
    # The first file was replaced after it had been read.
    assert [len(image_ids(name)) for (name,) in names] == [3, 3, 2, 1]


def test_the_image_folder_is_a_key(tmp_path):
    cfg = json_cfg(tmp_path)
    cfg.DATASETS.JSON.TRAIN_IMAGES = str(tmp_path / "photos")
    os.rename(tmp_path / "images", tmp_path / "photos")
    (name,) = register_from_config(cfg, splits=("TRAIN",)).DATASETS.TRAIN
    assert DatasetCatalog.get(name)[0]["file_name"] == str(tmp_path / "photos" / "0.png")


@pytest.mark.parametrize(
    "limit, ids", [(1, [10]), (3, [10, 40, 70]), (4, [10, 30, 50, 70]), (9, None), (50, None)]
)
def test_train_limit_takes_images_evenly_and_leaves_the_test_set_alone(tmp_path, limit, ids):
    every = [10 * i for i in range(1, 10)]
    cfg = register_from_config(json_cfg(tmp_path, coco_dict(images=9), TRAIN_LIMIT=limit))
    assert image_ids(cfg.DATASETS.TRAIN[0]) == (ids or every)
    assert image_ids(cfg.DATASETS.TEST[0]) == every


def test_negative_train_limit_is_refused(tmp_path):
    with pytest.raises(UserError, match="TRAIN_LIMIT is -1"):
        register_from_config(json_cfg(tmp_path, TRAIN_LIMIT=-1))


def test_unusable_boxes_are_left_out_logged_and_listed(tmp_path, caplog):
    coco = coco_dict(images=4)
    coco["annotations"][1]["bbox"] = [9, 9, -4, 4]
    coco["annotations"][2]["bbox"] = [1, 1, 0, 4]
    with caplog.at_level("WARNING", "fgd.data.json_sets"):
        cfg = register_from_config(json_cfg(tmp_path, coco))
    assert "2 boxes dropped (1 inverted, 1 zero area)" in caplog.text
    (name,) = cfg.DATASETS.TEST
    assert [len(r["annotations"]) for r in DatasetCatalog.get(name)] == [1, 0, 0, 1]
    report = json.loads((tmp_path / "output" / "data_report.json").read_text())
    assert [d["annotation"] for d in report[name]["dropped"]] == [101, 102]
    assert [a["image_id"] for a in coco_ground_truth(name)["annotations"]] == [10, 40]


@pytest.mark.parametrize("number", [int, float])
def test_boxes_of_whole_numbers_are_resized_as_others(tmp_path, number):
    """Detectron2 resizes lists of integers in place, which cuts what lies behind the point."""
    coco = coco_dict(images=1)
    coco["annotations"][0]["bbox"] = [number(x) for x in (4, 6, 21, 11)]
    cfg = json_cfg(tmp_path, coco)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (50,), "none"
    cfg = register_from_config(cfg)
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, 0
    (sample,) = next(iter(build_detection_train_loader(cfg)))
    (box,) = sample["instances"].gt_boxes.tensor.tolist()
    wide, high = sample["image"].shape[2] / 64, sample["image"].shape[1] / 48
    assert box == pytest.approx([4 * wide, 6 * high, 25 * wide, 17 * high])
    assert box[0] % 1 and box[3] % 1


def test_file_without_iscrowd_area_and_segmentation_trains_and_evaluates(tmp_path):
    coco = coco_dict(images=4, category_ids=(3, 8))
    for entry in coco["annotations"]:
        del entry["iscrowd"], entry["area"]
    del coco["annotations"][3]  # and one image has no annotation
    cfg = json_cfg(tmp_path, coco)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 2
    cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    cfg = register_from_config(cfg)
    batch = next(iter(build_detection_train_loader(cfg)))
    assert sorted({int(c) for x in batch for c in x["instances"].gt_classes}) <= [0, 1]
    (name,) = cfg.DATASETS.TEST
    truth = coco_ground_truth(name)
    assert [a["area"] for a in truth["annotations"]] == [200.0] * 3
    assert {a["category_id"] for a in truth["annotations"]} == {3, 8}
    assert evaluate_truth(name, tmp_path)["AP"] == pytest.approx(100)


def evaluate_truth(name, folder):
    """COCO AP of the ground truth itself, through Detectron2's evaluator."""
    evaluator = COCOEvaluator(name, ("bbox",), False, str(folder), use_fast_impl=False)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        instances = Instances((record["height"], record["width"]))
        boxes = [
            BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            for a in record["annotations"]
        ]
        instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        instances.scores = torch.tensor([0.9] * len(boxes))
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("broken", ["missing", "empty", "foreign"])
def test_unusable_json_is_one_error_with_its_path(tmp_path, broken):
    cfg = json_cfg(tmp_path)
    path = tmp_path / "broken.json"
    if broken != "missing":
        path.write_text("" if broken == "empty" else '{"shapes": []}')
    cfg.DATASETS.JSON.TEST = str(path)
    with pytest.raises(UserError, match="broken.json") as caught:
        register_from_config(cfg)
    assert "\n" not in str(caught.value)


def test_builtin_set_without_files_names_path_and_variable(monkeypatch):
    cfg = get_fgd_cfg()
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data/sets")
    with pytest.raises(UserError) as caught:
        register_from_config(cfg)
    assert "instances_train2017.json does not exist" in str(caught.value)
    assert "DETECTRON2_DATASETS is /data/sets" in str(caught.value)


def test_unknown_name_suggests_similar_ones():
    cfg = get_fgd_cfg()
    cfg.DATASETS.TEST = ("coco_2017_vall",)
    with pytest.raises(UserError, match="'coco_2017_vall' is not registered .*coco_2017_val"):
        register_from_config(cfg)


def test_shapes_are_generated_under_the_output_folder(tmp_path):
    cfg = register_from_config(shapes_cfg(tmp_path))
    (train,), (test,) = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    assert train.startswith("shapes_train_") and test.startswith("shapes_test_")
    assert len(image_ids(train)) == 5 and len(image_ids(test)) == 3
    assert MetadataCatalog.get(test).thing_classes == ["circle", "triangle", "square"]
    assert len(list((tmp_path / "shapes").iterdir())) == 2
    assert register_from_config(cfg) == cfg
    assert evaluate_truth(test, tmp_path)["AP"] == pytest.approx(100)


def test_shapes_of_other_settings_lie_beside_and_follow_the_config(tmp_path):
    cfg = register_from_config(shapes_cfg(tmp_path))
    other = cfg.clone()
    other.DATASETS.SHAPES.NOISE = 3.0  # the name of the old set is still in DATASETS.TRAIN
    other = register_from_config(other)
    assert other.DATASETS.TRAIN != cfg.DATASETS.TRAIN
    assert len(list((tmp_path / "shapes").iterdir())) == 4


def test_shapes_settings_that_cannot_be_are_refused_before_writing(tmp_path):
    with pytest.raises(UserError, match="classes=7 is not possible"):
        register_from_config(shapes_cfg(tmp_path, CLASSES=7))
    assert list(tmp_path.iterdir()) == []


def test_a_single_split_leaves_the_other_alone(tmp_path):
    cfg = json_cfg(tmp_path, TRAIN=str(tmp_path / "gone.json"))
    registered = register_from_config(cfg, splits=("TEST",))
    assert registered.DATASETS.TRAIN == cfg.DATASETS.TRAIN and len(registered.DATASETS.TEST) == 1


def test_test_dataset_takes_a_name_or_a_path(tmp_path):
    path = write_coco(tmp_path, coco_dict())
    name = test_dataset(path)
    assert image_ids(name) == [10, 20, 30]
    assert test_dataset(name) == test_dataset(path, str(tmp_path / "images")) == name
    with pytest.raises(UserError, match="'bccd' is not registered"):
        test_dataset("bccd")
    with pytest.raises(UserError, match="gone.json"):
        test_dataset(str(tmp_path / "gone.json"))
    register_coco_instances("without_files", {}, str(tmp_path / "no.json"), str(tmp_path))
    with pytest.raises(UserError, match="'without_files': .*no.json does not exist"):
        test_dataset("without_files")
    DatasetCatalog.remove("without_files")
    MetadataCatalog.remove("without_files")


def _no_space(folder, settings):
    raise UserError("no space left")


def _register_in_process(folder: str) -> int:
    """The answers of one process: first with a main process that cannot write, then without."""
    cfg, generate = shapes_cfg(Path(folder)), datasets.generate
    datasets.generate = _no_space if comm.get_rank() == 0 else generate
    try:
        answer = register_from_config(cfg).DATASETS.TRAIN
    except UserError as error:
        answer = str(error)
    datasets.generate = generate
    answers = [answer, *register_from_config(cfg).DATASETS.TRAIN]
    (Path(folder) / f"answers_{comm.get_rank()}.json").write_text(json.dumps(answers))
    return 0


def test_processes_agree_on_success_and_on_failure(tmp_path):
    # They meet through a file: a port that was free a moment ago may be taken by another test.
    meeting_point = f"file://{tmp_path}/meeting_point"
    launch(
        _register_in_process, (str(tmp_path),), device="cpu", processes=2, dist_url=meeting_point
    )
    first, second = (json.loads((tmp_path / f"answers_{i}.json").read_text()) for i in (0, 1))
    assert first == second
    failure, name = first
    assert failure == "no space left" and name.startswith("shapes_train_")
    assert len(list((tmp_path / "shapes").iterdir())) == 2
