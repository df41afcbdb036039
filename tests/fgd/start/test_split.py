"""What is set apart: near duplicates stay together, each class is trained on, always the same."""

import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from fgd.errors import UserError
from fgd.start.split import groups, look, lost_classes, part_json, split
from fgd_inputs.coco import read_coco

from .drawn import blocks, surveyed, write_set


def looked_at(path):
    return look(read_coco(str(path)).images)


def test_near_duplicates_are_one_group(tmp_path):
    """Smaller, brighter, noisy and as JPEG; not: of another grey without any structure."""
    first = blocks(0, 96, 96)
    noise = np.random.default_rng(0).integers(-6, 7, (96, 96, 3))
    noisy = Image.fromarray((np.asarray(first).astype(int) + noise).clip(0, 255).astype("uint8"))
    first.save(tmp_path / "first.jpg", quality=40)
    copies = [first, first.resize((64, 64)), ImageEnhance.Brightness(first).enhance(1.08), noisy]
    copies.append(Image.open(tmp_path / "first.jpg"))
    flat = [Image.new("RGB", (64, 64), (grey,) * 3) for grey in (40, 44, 120)]
    others = [blocks(i, 96, 96) for i in range(1, 6)]
    path = write_set(tmp_path / "set", pictures=[*copies, *flat, *others], sizes=[(1, 1)] * 13)
    found = groups(looked_at(path))
    assert len(set(found[:5])) == 1 and found[5] == found[6] != found[7]
    assert len(set(found)) == 1 + 2 + 5


def test_bad_images_are_told(tmp_path):
    path = write_set(tmp_path)
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    blocks(5, 32, 64).save(tmp_path / "images" / "5.png")
    looks = looked_at(path)
    assert set(looks.bad) == {2, 5} and "cannot read image" in looks.bad[2]
    assert looks.bad[5].endswith("5.png is 32x64, the JSON says 64x64")


def test_parts_hold_whole_groups_of_15_percent(tmp_path):
    survey = surveyed(tmp_path, sizes=[(64, 64)] * 40)
    group = np.repeat(np.arange(20), 2)
    parts = split(survey, group, ["valid", "test"])
    assert {name: len(own) for name, own in parts.items()} == {"train": 28, "valid": 6, "test": 6}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(40))
    owners = [set(group[own]) for own in parts.values()]
    assert sum(map(len, owners)) == 20
    again = split(survey, group, ["valid", "test"])
    assert all((own == again[name]).all() for name, own in parts.items())


def test_a_rare_class_stays_in_training(tmp_path):
    boxes = [[(0, 10, 10, 20, 20)] for _ in range(12)]
    boxes[7] = [(1, 10, 10, 20, 20)]
    survey = surveyed(tmp_path, sizes=[(64, 64)] * 12, boxes=boxes)
    parts = split(survey, np.arange(12), ["valid", "test"])
    assert 7 in parts["train"]
    assert lost_classes(survey, parts) == [("valid", ["b"]), ("test", ["b"])]


def test_images_of_group_minus_1_stay_in_training(tmp_path):
    survey = surveyed(tmp_path)
    parts = split(survey, np.array([-1] * 6 + [0, 1]), ["valid"])
    assert set(range(6)) < set(parts["train"]) and len(parts["valid"]) == 1


@pytest.mark.parametrize(
    "group, boxes",
    [([0] * 8, ()), ([0] * 7 + [1], ()), (range(8), [[(0, 10, 10, 20, 20)]] * 2 + [[]] * 6)],
    ids=["all alike", "two groups", "two with boxes"],
)
def test_too_few_to_set_any_apart(group, boxes, tmp_path):
    survey = surveyed(tmp_path, boxes=boxes)
    with pytest.raises(UserError) as caught:
        split(survey, np.array(group), ["valid", "test"])
    count = len(set(group))
    assert str(caught.value) == (
        f"dataset JSON {survey.found.path}: its 8 images, in {count} groups of near duplicates, "
        "are too few to set valid and test images with boxes apart; give --valid and --test"
    )


def test_the_json_of_a_part_reads_as_what_it_is_of(tmp_path):
    boxes = [[(i % 2, 10, 10, 20 + i, 20)] for i in range(8)]
    path = write_set(tmp_path, boxes=boxes, classes=["café \U0001f600", "yes: [no]"])
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = f"C:\\photos\\{image['file_name']}"
    path.write_text(json.dumps(content))
    found = read_coco(str(path))
    (tmp_path / "part.json").write_bytes(part_json(found, [1, 4], str(tmp_path / "images"), "test"))
    part = read_coco(str(tmp_path / "part.json"))
    assert part.images == [{**found.images[i], "file_name": f"{i}.png"} for i in (1, 4)]
    assert part.categories == found.categories
    assert [x["bbox"] for x in part.annotations] == [[10, 10, 21, 20], [10, 10, 24, 20]]
