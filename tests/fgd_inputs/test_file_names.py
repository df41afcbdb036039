"""Where images are looked for, and the ways in which tools write their names."""

import json

import pytest

from fgd_inputs.coco import read_coco
from fgd_inputs.errors import UserError
from fgd_inputs.file_names import image_folder

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
    path = renamed(tmp_path, lambda name: f"photos/{name}")
    with pytest.raises(UserError, match=r"image 'photos/0.png' .* is not in .*images; set IT"):
        read_coco(path, hint="set IT")
    with pytest.raises(UserError, match="image folder .*nowhere.* does not exist; name the folder"):
        read_coco(path, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="gone.json does not exist"):
        read_coco(str(tmp_path / "gone.json"))
    assert len(read_coco(path, files=False).images) == 3
