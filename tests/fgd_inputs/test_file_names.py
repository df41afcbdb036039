"""Where images are looked for, and the ways in which tools write their names."""

import json

import pytest

from fgd_inputs.coco import read_coco
from fgd_inputs.errors import UserError
from fgd_inputs.file_names import find_entries, image_folder

from .coco_files import coco_dict, write_coco


def test_the_folder_beside_the_json_its_own_or_as_given(tmp_path):
    path = str(tmp_path / "labels.json")
    assert image_folder(path) == str(tmp_path)
    (tmp_path / "images").mkdir()
    assert image_folder(path) == str(tmp_path / "images")
    assert image_folder(str(tmp_path / "annotations" / "train.json")) == str(tmp_path / "images")
    assert image_folder(path, str(tmp_path / "photos")) == str(tmp_path / "photos")
    assert image_folder(path, "~").startswith("/") and "~" not in image_folder(path, "~")


def renamed(folder, write):
    """A dataset whose file names are written another way than the files are called."""
    coco = coco_dict()
    path = write_coco(folder, coco)
    for image in coco["images"]:
        image["file_name"] = write(image["file_name"])
    (folder / "labels.json").write_text(json.dumps(coco))
    return path


@pytest.mark.parametrize(
    "write, note",
    [
        (lambda name: name, ""),
        (lambda name: f".\\{name}", "read with / for \\"),
        (lambda name: name.replace(".", "%2E"), "read without %-escapes"),
        (lambda name: f"images/{name}", "read without the name of their folder"),
        (lambda name: f"images\\{name}", "read without the name of their folder"),
        (
            lambda name: f"images%2F{name}",
            "read without %-escapes and the name of their folder",
        ),
    ],
)
def test_what_tools_write_is_read_and_said(write, note, tmp_path):
    found = read_coco(renamed(tmp_path, write))
    assert [image["file"] for image in found.images] == [
        str(tmp_path / "images" / f"{i}.png").replace(
            "images/", "images/./" if "/ for" in note else "images/"
        )
        for i in range(3)
    ]
    assert found.notes == ([f"file names are {note}"] if note else [])


def test_a_real_file_is_never_read_otherwise(tmp_path):
    coco = coco_dict()
    coco["images"][0]["file_name"] = "a%20b.png"
    found = read_coco(write_coco(tmp_path, coco))
    assert found.images[0]["file"].endswith("a%20b.png") and found.notes == []


def test_images_that_are_nowhere_are_named_with_what_to_set(tmp_path):
    path = renamed(tmp_path, lambda name: f"photos/a{name}")
    with pytest.raises(UserError, match=r"image 'photos/a0.png' .* is not in .*images; set IT"):
        read_coco(path, hint="set IT")
    with pytest.raises(UserError, match="image folder .*nowhere.* does not exist; name the folder"):
        read_coco(path, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="gone.json does not exist"):
        read_coco(str(tmp_path / "gone.json"))
    assert len(read_coco(path, files=False).images) == 3


def test_images_beside_the_json_come_before_those_one_folder_up(tmp_path):
    path = write_coco(tmp_path / "train", coco_dict())
    (tmp_path / "train" / "images").rename(tmp_path / "images")
    assert image_folder(path) == str(tmp_path / "images")
    (tmp_path / "train" / "0.PNG").touch()
    assert image_folder(path) == str(tmp_path / "train")


def test_last_parts_of_names_are_taken_where_they_differ(tmp_path):
    path = renamed(tmp_path, lambda name: f"https://a.org/x%20y/{name}?token=1/2")
    found = read_coco(path)
    assert found.images[2]["file"] == str(tmp_path / "images" / "2.png")
    assert found.notes == ["file names are read without their folders"]
    content = json.loads((tmp_path / "labels.json").read_text())
    content["images"][1]["file_name"] = "b/0.png"
    (tmp_path / "labels.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="'https://a.org/x%20y/0.png.token=1/2' .* is not in"):
        read_coco(path)


def test_an_image_belongs_to_the_entry_that_its_path_ends_in():
    names = ["a/0.png", "b/0.png", "b\\1.png"]
    assert find_entries("x.json", names, ["/d/b/0.png", "/d/a/0.png"]) == ([1, 0], "")
    note = "file names are read with / for \\"
    assert find_entries("x.json", names, ["/d/b/1.png"]) == ([2], note)
    note = "file names are read without their folders"
    assert find_entries("x.json", ["C:\\my%20d\\1.png"], ["/d/1.png"]) == ([0], note)
    for file, count in (("/d/0.png", 0), ("/d/c/a/0.png.bak", 0)):
        with pytest.raises(UserError, match=f"{file} is {count} times among the images of x.json"):
            find_entries("x.json", names, [file])
    with pytest.raises(UserError, match="/d/0.png is 2 times"):
        find_entries("x.json", ["0.png", "d/0.png"], ["/d/0.png"])
