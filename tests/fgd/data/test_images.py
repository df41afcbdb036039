"""Training reads the pixels that serving reads, or refuses the file as serving does."""

import itertools
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image as detectron2s
from PIL import Image

from deploy.errors import UserError as ServingError
from deploy.serving import preprocess
from fgd.data.images import BadImage, read_image
from fgd.data.stream import build_train_stream, plan_batches
from fgd.engine.trainer import FGDTrainer
from fgd.errors import UserError
from fgd_inputs.file_names import find_images
from tests.fgd.training import training_cfg

from .test_stream import assert_same_batches, names, take


def noise(height=40, width=60, channels=3, dtype=np.uint8):
    shape = (height, width, channels) if channels > 1 else (height, width)
    most = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, most + 1, shape, dtype)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def sixteen_bit_colour(path):
    """A PNG that Pillow cannot write: 16 bits in each of three channels, most of them low."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    pixels = noise(40, 60, dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 60, 40, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return (pixels >> 8).astype(np.uint8)[:, :, ::-1]


RGB = Image.fromarray(noise())
GOOD = {
    **{f"exif{i}.jpg": (RGB, turned(i)) for i in range(1, 9)},
    "exif6.png": (RGB, turned(6)),
    "exif6.tif": (RGB, turned(6)),
    "exif3.tif": (RGB, turned(3)),
    "grey.jpg": (RGB.convert("L"), {}),
    "grey_alpha.png": (RGB.convert("LA"), {}),
    "bit.png": (RGB.convert("1"), {}),
    "palette.png": (RGB.convert("P"), {}),
    "palette.gif": (RGB.convert("P"), {}),
    "cmyk.jpg": (RGB.convert("CMYK"), {}),
    "cmyk.tif": (RGB.convert("CMYK"), {}),
    "alpha.png": (Image.fromarray(noise(channels=4), "RGBA"), {}),
    "plain.bmp": (RGB, {}),
    "plain.webp": (RGB, {"lossless": True}),
    "thin.png": (Image.fromarray(noise(1, 50)), {}),
}
BAD = {
    "16.png": (Image.fromarray(noise(channels=1, dtype=np.uint16)), "mode 'I;16"),
    "16.tif": (Image.fromarray(noise(channels=1, dtype=np.uint16)), "mode 'I;16"),
    "32.tif": (Image.fromarray(noise(channels=1, dtype=np.int32)), "mode 'I'"),
    "float.tif": (Image.fromarray(np.full((4, 4), 0.5, np.float32)), "mode 'F'"),
    "large.png": (Image.new("1", (9500, 9500)), "9500x9500 is more than .*89478485"),
}


@pytest.mark.parametrize("name", GOOD)
def test_pixels_are_those_of_serving(name, tmp_path):
    image, options = GOOD[name]
    image.save(tmp_path / name, **options)
    pixels = read_image(str(tmp_path / name), "BGR")
    np.testing.assert_array_equal(pixels, preprocess.load_image(tmp_path / name))
    if not name.startswith("exif") or name.endswith("jpg"):  # Detectron2 turns TIFF twice
        np.testing.assert_array_equal(pixels, detectron2s(str(tmp_path / name), "BGR"))
    rgb = read_image(str(tmp_path / name), "RGB")
    np.testing.assert_array_equal(rgb, pixels[:, :, ::-1])


def test_16_bit_colour_keeps_its_high_bytes(tmp_path):
    expected = sixteen_bit_colour(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), "BGR"), expected)
    np.testing.assert_array_equal(preprocess.load_image(tmp_path / "a.png"), expected)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_what_would_be_misread_is_refused_as_in_serving(name, tmp_path):
    image, reason = BAD[name]
    image.save(tmp_path / name)
    with pytest.raises(BadImage, match=f"{name}: .*{reason}") as error:
        read_image(str(tmp_path / name), "BGR")
    assert error.value.exit_code == 2
    with pytest.raises(ServingError, match=reason):
        preprocess.load_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["ppm", "pgm", "jp2", "webp", "tif", "gif", "bmp"])
def test_one_list_of_formats(suffix, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(pixels)
    (image.convert("L") if suffix == "pgm" else image).save(path)
    found = read_image(str(path), "BGR")
    assert found.shape == (12, 15, 3)
    np.testing.assert_array_equal(preprocess.load_image(path), found)
    assert find_images([tmp_path]) == [path]


def test_no_other_program_is_started(tmp_path, monkeypatch):
    """Pillow would hand PostScript to Ghostscript, whatever the file is called."""
    path = tmp_path / "x.png"
    Image.new("RGB", (9, 9)).save(path, "EPS")
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: pytest.fail("started"))
    with pytest.raises(BadImage, match="cannot read image .*x.png: cannot identify"):
        read_image(str(path), "RGB")
    with pytest.raises(ServingError, match="cannot read image"):
        preprocess.load_image(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def break_chunk(path):
    """What Pillow reports as a SyntaxError."""
    data = bytearray(path.read_bytes())
    data[37:41] = b"\x80\x80\x80\x80"
    path.write_bytes(data)


def resize(path):
    Image.fromarray(noise(50, 50)).save(path)


def thin(path):
    """Too thin to resize; the JSON agrees with its size."""
    Image.fromarray(noise(1, 900)).save(path)
    text = path.parents[1] / "data.json"
    content = json.loads(text.read_text())
    (entry,) = [x for x in content["images"] if x["file_name"] == path.name]
    entry.update(width=900, height=1)
    for annotation in content["annotations"]:
        if annotation["image_id"] == entry["id"]:
            annotation["bbox"] = [4, 0, 24, 1]
    text.write_text(json.dumps(content))


FAULTS = {
    "truncated": (truncate, "cannot read image .*{}: .*truncated"),
    "broken": (break_chunk, "cannot read image .*{}: "),
    "empty": (lambda path: path.write_bytes(b""), "cannot read image .*{}: cannot identify"),
    "html": (lambda path: path.write_text("<html>"), "cannot read image .*{}: cannot identify"),
    "missing": (Path.unlink, "cannot read image .*{}: .*No such file"),
    "size": (resize, r"{}, got \(50, 50\), expect"),
    "thin": (thin, "{} of 900x1: height and width must be > 0"),
}


def spoiled(tmp_path, fault, opts=(), seed=0):
    """Config of a run, after its data were checked, with one random image made bad; its name."""
    cfg = training_cfg(tmp_path, opts=("DATALOADER.BAD_IMAGES", "error", *opts))
    path = tmp_path / "data" / "images" / f"{random.Random(f'{fault}{seed}').randrange(6)}.png"
    FAULTS[fault][0](path)
    if fault == "thin":
        cfg = training_cfg(tmp_path, opts=opts)
    return cfg, path.name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_image_is_named(fault, workers, tmp_path):
    cfg, name = spoiled(tmp_path, fault, ("DATALOADER.NUM_WORKERS", workers))
    with pytest.raises(UserError, match=FAULTS[fault][1].format(name)):
        take(build_train_stream(cfg), 6)


SKIP = ("DATALOADER.BAD_IMAGES", "skip")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["truncated", "size", "thin"])
def test_skipping_takes_the_next_of_its_orientation(fault, workers, tmp_path, caplog):
    cfg, name = spoiled(tmp_path, fault, (*SKIP, "DATALOADER.NUM_WORKERS", workers))
    stream = build_train_stream(cfg)
    batches = take(stream, 12)
    used = sum(names(batches), [])
    assert name not in used and set(used) == {f"{i}.png" for i in range(6)} - {name}
    planned = [k[0] for b in take_plan(stream, 12) for k in b]
    bad = next(i for i, x in enumerate(stream.dicts) if x["file_name"].endswith(name))
    group = stream.groups[bad]
    following = next(i % 6 for i in (bad + 1, bad + 2) if stream.groups[i % 6] == group)
    expected = [following if index == bad else index for index in planned]
    assert used == [Path(stream.dicts[i]["file_name"]).name for i in expected]
    assert len(stream.bad_images) == 1 and name in stream.bad_images[0]
    assert caplog.text.count("Skipped (1 of at most 10)") == 1
    assert not any("skipped" in x for batch in batches for x in batch)
    later = build_train_stream(cfg)
    later.start = 7
    assert_same_batches(take(later, 5), batches[7:])


def take_plan(stream, count):
    return itertools.islice(plan_batches(stream.make_sampler(stream.seed), stream.groups, 2), count)


def test_skipping_is_capped_and_images_are_counted_once(tmp_path):
    cfg, _ = spoiled(tmp_path, "truncated", (*SKIP, "DATALOADER.MAX_BAD_IMAGES", 1))
    take(build_train_stream(cfg), 12)  # the same one again and again
    for path in (tmp_path / "data" / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadImage, match="cannot read image"):
        take(build_train_stream(cfg), 1)
    cfg.DATALOADER.MAX_BAD_IMAGES = 100
    with pytest.raises(BadImage, match="no image of its orientation can be used; cannot read"):
        take(build_train_stream(cfg), 1)


def test_one_more_than_the_cap_is_an_error(tmp_path):
    cfg, name = spoiled(tmp_path, "truncated", (*SKIP, "DATALOADER.MAX_BAD_IMAGES", 1))
    other = tmp_path / "data" / "images" / f"{(int(name[0]) + 1) % 6}.png"  # the other orientation
    other.write_bytes(b"")
    with pytest.raises(BadImage, match="2 images cannot be used, .*MAX_BAD_IMAGES is 1; the last"):
        take(build_train_stream(cfg), 12)


def test_unknown_policies_are_refused(tmp_path):
    with pytest.raises(UserError, match="BAD_IMAGES: 'ignore' is neither"):
        build_train_stream(training_cfg(tmp_path, opts=("DATALOADER.BAD_IMAGES", "ignore")))
    with pytest.raises(UserError, match="MAX_BAD_IMAGES: -1 is below 0"):
        build_train_stream(training_cfg(tmp_path, opts=(*SKIP, "DATALOADER.MAX_BAD_IMAGES", -1)))


def test_a_bad_test_image_is_an_error_whatever_the_policy(tmp_path):
    cfg, name = spoiled(tmp_path, "truncated", SKIP)
    model = FGDTrainer.build_model(cfg)
    with pytest.raises(UserError, match=f"cannot read image .*{name}"):
        FGDTrainer.test(cfg, model)


def test_every_kind_of_file_trains_and_evaluates(tmp_path):
    """Batches of all kinds reach the model; the thin one has no side left at this size."""
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    coco = {"images": [], "annotations": [], "categories": []}
    coco["categories"] = [{"id": i, "name": f"c{i}"} for i in (1, 2, 3)]
    for i, (name, (image, options)) in enumerate(GOOD.items()):
        if name == "thin.png":
            continue
        image.save(folder / name, **options)
        height, width = preprocess.load_image(folder / name).shape[:2]
        coco["images"].append({"id": i, "file_name": name, "height": height, "width": width})
        annotation = {"id": i + 1, "image_id": i, "category_id": 1 + i % 3, "iscrowd": 0}
        coco["annotations"].append({**annotation, "bbox": [4, 6, 24, 30], "area": 720})
    (tmp_path / "data" / "data.json").write_text(json.dumps(coco))
    opts = ("SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.STEPS", ())
    cfg = training_cfg(tmp_path, opts=opts)
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.last_results["bbox"].keys() >= {"AP"}
    seen = {Path(x["file_name"]).name for b in take(build_train_stream(cfg), 3) for x in b}
    assert len(seen) >= len(GOOD) - 3
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
