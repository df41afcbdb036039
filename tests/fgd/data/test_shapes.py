import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from fgd.data import shapes
from fgd.data.drawing import ShapesSettings, draw_image
from fgd.data.shapes import generate, main
from fgd.errors import UserError

SMALL = ShapesSettings(images=6, seed=1)


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [(p.relative_to(folder), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def test_files_are_the_same_bytes_for_the_same_settings(tmp_path):
    generate(tmp_path / "a", SMALL)
    generate(tmp_path / "b", ShapesSettings(images=6, seed=1))
    assert len(digest(tmp_path / "a")) == 7
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_longer_set_begins_with_the_shorter_one(tmp_path):
    short = json.loads(generate(tmp_path / "a", SMALL).read_text())
    long = json.loads(generate(tmp_path / "b", ShapesSettings(images=9, seed=1)).read_text())
    assert long["images"][:6] == short["images"]
    assert long["annotations"][: len(short["annotations"])] == short["annotations"]


def test_json_is_coco_and_files_hold_the_drawn_pixels(tmp_path):
    path = generate(tmp_path / "set", SMALL)
    coco = json.loads(path.read_text())
    assert [c["name"] for c in coco["categories"]] == ["circle", "triangle", "square"]
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for index, image in enumerate(coco["images"]):
        stored = np.asarray(Image.open(path.parent / "images" / image["file_name"]))
        pixels, objects = draw_image(index, SMALL)
        np.testing.assert_array_equal(stored, pixels)
        assert (image["height"], image["width"]) == stored.shape[:2]
        own = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert [a["category_id"] - 1 for a in own] == [label for label, _ in objects]


def test_boxes_are_tight_around_the_masks_and_not_degenerate(tmp_path):
    coco = json.loads(generate(tmp_path / "set", ShapesSettings(images=40)).read_text())
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        points = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        np.testing.assert_allclose([x, y], points.min(axis=0), atol=0.011)
        np.testing.assert_allclose([x + w, y + h], points.max(axis=0), atol=0.011)
        assert 17.9 < w < 60.1 and 17.9 < h < 60.1
        rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], 96, 96))
        mask = mask_util.decode(rle)
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.08)
        rows, columns = np.nonzero(mask)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        # pycocotools rasterises at whole pixels, and the tip of a triangle covers few of them.
        np.testing.assert_allclose(extent, [x, y, x + w, y + h], atol=1.5)


def test_existing_set_is_used_again_untouched(tmp_path, monkeypatch):
    path = generate(tmp_path / "set", SMALL)
    monkeypatch.setattr(shapes, "draw_image", lambda *_: pytest.fail("drawn again"))
    assert generate(tmp_path / "set", SMALL) == path


def test_other_settings_never_mix(tmp_path):
    generate(tmp_path / "set", SMALL)
    before = digest(tmp_path / "set")
    with pytest.raises(UserError, match="holds other shapes than asked for"):
        generate(tmp_path / "set", ShapesSettings(images=6, seed=2))
    assert digest(tmp_path / "set") == before
    assert SMALL.digest != ShapesSettings(images=6, seed=2).digest


def test_incomplete_or_foreign_folder_is_refused(tmp_path):
    path = generate(tmp_path / "set", SMALL)
    (path.parent / "images" / "000003.png").unlink()
    with pytest.raises(UserError, match="5 images"):
        generate(tmp_path / "set", SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="not a set of drawn shapes"):
        generate(tmp_path / "mine", SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        generate(tmp_path / "file", SMALL)


def test_interrupted_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(index, settings):
        if index == 3:
            raise KeyboardInterrupt
        return draw_image(index, settings)

    monkeypatch.setattr(shapes, "draw_image", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_writers_at_the_same_time_agree(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: generate(tmp_path / "set", SMALL), range(4)))
    assert set(paths) == {tmp_path / "set" / "annotations.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_command_line_writes_the_same_set(tmp_path):
    options = "--images 6 --seed 1 --size 96 96".split()
    command = [sys.executable, "-m", "fgd.data.shapes", str(tmp_path / "cli"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "cli" / "annotations.json")
    generate(tmp_path / "api", SMALL)
    assert digest(tmp_path / "cli") == digest(tmp_path / "api")


def test_command_line_error_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "set"), "--classes", "9"])
    assert caught.value.code == 2
    assert "classes=9 is not possible" in capsys.readouterr().err.splitlines()[-1]
