"""What is said of datasets by their content: training and test images that are the same."""

import shutil

import pytest
from PIL import Image

from fgd.config import get_fgd_cfg
from fgd.data.contents import (
    ImageSet,
    describe_sets,
    shared_between,
    shared_images,
)
from fgd.data.datasets import image_sets, register_from_config
from fgd.errors import UserError
from fgd.files import file_sha256
from tests.fgd_inputs.coco_files import coco_dict, write_coco


def write_set(folder, colours):
    """A set with a picture of each colour; returns its JSON."""
    path = write_coco(folder, coco_dict(len(colours)))
    for i, colour in enumerate(colours):
        Image.new("RGB", (64, 48), (colour,) * 3).save(folder / "images" / f"{i}.png")
    return path


def config(train="", test=""):
    cfg = get_fgd_cfg()
    cfg.DATASETS.JSON.TRAIN, cfg.DATASETS.JSON.TEST = str(train), str(test)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    return cfg


@pytest.mark.parametrize(
    ("colours", "sentence"),
    [
        ((200, 201, 202), ""),
        ((200, 11, 201), "1 of 3 test images are in the training set too (the first: "),
        ((12, 11, 10), "all 3 test images are in the training set too (the first: "),
    ],
)
def test_images_of_both_sets_are_named(tmp_path, colours, sentence):
    train, test = write_set(tmp_path / "a", (10, 11, 12)), write_set(tmp_path / "b", colours)
    found = shared_images(register_from_config(config(train, test)))
    assert found.startswith(sentence) and bool(found) is bool(sentence)
    if sentence:
        place = 1 if colours[0] == 200 else 0
        there = colours[place] - 10
        assert f"b/images/{place}.png is /" in found and f"a/images/{there}.png)" in found


def test_the_training_set_as_test_set_is_said_whatever_its_json(tmp_path):
    path = write_set(tmp_path / "a", (10, 11, 12))
    other = shutil.copy(path, tmp_path / "a" / "copy.json")
    found = shared_images(register_from_config(config(path, other)))
    assert found.startswith("all 3 test images are in the training set too (the first: /")
    assert " is /" not in found and found.endswith("so AP says little of other images")


def test_a_description_follows_the_content(tmp_path):
    train = write_set(tmp_path / "a", (10, 11, 12))
    (own,) = image_sets(config(train), "TRAIN")
    before = describe_sets([own])
    assert before["annotations"] == file_sha256(train) and len(before["images"]) == 64
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert describe_sets(image_sets(config(str(tmp_path / "moved/labels.json")), "TRAIN")) == before
    Image.new("RGB", (64, 48), (99, 9, 9)).save(tmp_path / "a" / "images" / "1.png")
    after = describe_sets(image_sets(config(train), "TRAIN"))
    assert after["annotations"] == before["annotations"] and after["images"] != before["images"]
    registered = register_from_config(config(train)).DATASETS.TRAIN
    assert describe_sets(image_sets(config(train), "TRAIN")) == after and len(registered) == 1


def test_several_sets_are_described_together(tmp_path):
    sets = [ImageSet(x, [str(tmp_path / x)]) for x in ("one", "two")]
    both, one = describe_sets(sets), describe_sets(sets[:1])
    assert one["annotations"] == "one" and len(both["annotations"]) == 64
    assert describe_sets([*sets, ImageSet("", [])])["annotations"] == ""
    assert shared_between([], sets) == shared_between(sets, []) == ""


def test_images_that_are_gone_are_refused(tmp_path):
    train = write_set(tmp_path / "a", (10, 11))
    shutil.rmtree(tmp_path / "a" / "images")
    with pytest.raises(UserError, match="0.png"):
        image_sets(config(train), "TRAIN")
