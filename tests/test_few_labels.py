"""A share of a training set with labels, the rest without."""

import json

import numpy as np
import pytest

from fgd_inputs.coco import read_coco
from tests.fgd.training import write_dataset
from tools.few_labels import draw, main


def test_the_two_parts_are_the_whole_set(tmp_path, capsys):
    path, output = write_dataset(tmp_path), tmp_path / "few"
    words = [str(path), "--share", "0.34", "--output", str(output), "--seed", "3"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{output}: 2 labelled images, 4 others\n"
    whole, part = json.loads(path.read_text()), json.loads((output / "labelled.json").read_text())
    ids = [image["id"] for image in part["images"]]
    assert len(ids) == 2 and part["categories"] == whole["categories"]
    expected = [x for x in whole["annotations"] if x["image_id"] in ids]
    assert part["annotations"] == expected and len(expected) == 4
    read = read_coco(str(output / "labelled.json"))  # its images are found
    assert [image["file"] for image in read.images] == [
        str(tmp_path / "images" / f"{i}.png") for i in ids
    ]
    rest = sorted(set(range(6)) - set(ids))
    assert sorted(x.name for x in (output / "unlabelled").iterdir()) == [
        f"{i}_{i}.png" for i in rest
    ]
    for i in rest:
        copy = output / "unlabelled" / f"{i}_{i}.png"
        assert copy.read_bytes() == (tmp_path / "images" / f"{i}.png").read_bytes()
    assert main(words) == 2 and "it exists; name another" in capsys.readouterr().err


def test_a_seed_draws_the_same_images():
    assert np.array_equal(draw(50, 0.2, 4), draw(50, 0.2, 4)) and draw(50, 0.2, 4).sum() == 10
    assert not np.array_equal(draw(50, 0.2, 4), draw(50, 0.2, 5))


@pytest.mark.parametrize("share", ["0", "1", "1.5", "0.01", "0.99", "nan"])
def test_a_share_that_leaves_nothing_to_compare(tmp_path, capsys, share):
    words = [str(write_dataset(tmp_path)), "--share", share, "--output", str(tmp_path / "few")]
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: --share {float(share):g} of 6 images is ")
    assert not (tmp_path / "few").exists()
