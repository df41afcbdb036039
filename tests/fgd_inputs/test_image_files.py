"""Training and deployment read the same files to the same pixels, and neither starts a program."""

import json
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

from deploy import evaluate, predict
from deploy.serving.preprocess import load_image
from fgd.data.images import read_image
from fgd_inputs.file_names import SUFFIXES, find_images
from fgd_inputs.image_files import FORMATS, BadImage

from ..deploy.coco_files import truth
from ..deploy.fake_graph import write_fake_graph

EXACT = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


@pytest.fixture
def no_programs(monkeypatch):
    """Whatever starts one fails the test, also if the reader catches it."""
    started = []

    def start(*arguments, **_):
        started.append(arguments)
        raise AssertionError(f"started {arguments}")

    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn"), (os, "fork")):
        monkeypatch.setattr(module, name, start)
    yield
    assert started == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_listed_and_read_to_the_same_pixels(tmp_path, suffix, no_programs):
    path, kind = tmp_path / f"a{suffix}", Image.registered_extensions()[suffix]
    mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
    image = Image.fromarray(PICTURE).convert(mode)
    image.save(path, kind, **EXACT.get(kind, {}))
    assert kind in FORMATS and find_images([tmp_path]) == [path]
    pixels = load_image(path)
    np.testing.assert_array_equal(read_image(str(path), "BGR"), pixels)
    if kind not in ("JPEG", "GIF"):
        np.testing.assert_array_equal(pixels[:, :, ::-1], np.asarray(image.convert("RGB")))


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 24
%%EndComments
32 24 moveto 0 0 lineto stroke
showpage
%%EOF
"""


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".eps", ".ps", ".tif", ".jp2"])
def test_postscript_is_refused_whatever_its_name(tmp_path, suffix, no_programs):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(EPS)
    for read in (load_image, lambda name: read_image(name, "BGR")):
        with pytest.raises(BadImage, match=f"cannot read image .*x{suffix}"):
            read(str(path))
    write_fake_graph(tmp_path / "m.onnx")
    words = [tmp_path / "m.onnx", path, "--output", tmp_path / "out", "--threads", 1]
    assert predict.main([str(word) for word in words]) == 2
    report = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["file"] for entry in report["failed"]] == [str(path)]


@pytest.mark.parametrize("suffix", [".ppm", ".jp2", ".png"])
def test_odd_formats_are_predicted_drawn_and_evaluated(tmp_path, suffix):
    content, folder = truth(), tmp_path / "images"
    folder.mkdir()
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace(".png", suffix)
        picture = Image.new("RGB", (image["width"], image["height"]), (26, 153, 255))
        picture.save(folder / image["file_name"])
    (tmp_path / "test.json").write_text(json.dumps(content))
    write_fake_graph(tmp_path / "m.onnx")
    words = [tmp_path / "m.onnx", folder, "--output", tmp_path / "out", "--threads", 1]
    assert predict.main([str(word) for word in words]) == 0
    report = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["scores"] for entry in report["images"]] == [[1.0, 0.6]] * 3
    assert Image.open(tmp_path / "out" / report["images"][0]["picture"]).size == (480, 320)
    words = [tmp_path / "m.onnx", "--dataset", tmp_path / "test.json", "--threads", 1]
    assert evaluate.main([*map(str, words), "--output", str(tmp_path / "ap.json")]) == 0
    metrics = json.loads((tmp_path / "ap.json").read_text())["metrics"]
    assert metrics["AP"] == {"onnx": pytest.approx(100)}
