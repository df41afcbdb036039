"""Noise where all objects are small, crops where not; second images follow the same geometry."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, PolygonMasks
from PIL import Image

from fgd.config import check_config, get_fgd_cfg
from fgd.data import augmentation
from fgd.data.augmentation import (
    CropWhereLarge,
    NoiseWhereSmall,
    SampleInput,
    Window,
    sample_input,
)
from fgd.data.images import BadImage
from fgd.data.stream import build_train_stream
from fgd.errors import UserError
from fgd.processes import rng
from tests.fgd.training import training_cfg

from .test_stream import assert_same_batches, names, take

GREY = np.full((60, 100, 3), 128, np.uint8)
SMALL, LARGE = [10.0, 10, 31, 32], [10.0, 10, 32, 32]  # width, height; 32 * 32 is not below 1024


def annotation(box, **more):
    return {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, **more}


@pytest.mark.parametrize(
    "boxes, all_small",
    [
        ([], True),
        ([annotation(SMALL)], True),
        ([annotation(LARGE)], False),
        ([annotation(SMALL), annotation(LARGE)], False),
        ([annotation(SMALL), annotation(LARGE, iscrowd=1)], True),
        ([annotation([0, 0, 1000, 1])], True),  # the area counts, not the sides
    ],
)
def test_small_is_by_the_area_of_every_box(boxes, all_small):
    found = sample_input(GREY, boxes, 1024.0)
    assert found.all_small is all_small
    assert found.boxes.shape == (sum(not x.get("iscrowd") for x in boxes), 4)
    if boxes:
        x, y, w, h = boxes[0]["bbox"]
        assert found.boxes[0].tolist() == [x, y, x + w, y + h]


def test_noise_has_its_strength_and_share_and_touches_small_ones_only():
    noise, changed = NoiseWhereSmall(0.3, 0.08), 0
    with rng.seeded(1):
        for _ in range(400):
            sample = SampleInput(GREY, np.zeros((0, 4)), True)
            noise(sample)
            if sample.image is not GREY:
                changed += 1
                difference = sample.image.astype(float) - 128
        for _ in range(50):
            large = SampleInput(GREY, np.zeros((0, 4)), False)
            noise(large)
            assert np.array_equal(large.image, GREY)
    assert changed / 400 == pytest.approx(0.3, abs=0.07)  # three standard errors
    assert sample.image.dtype == np.uint8 and sample.image.shape == GREY.shape
    assert difference.std() == pytest.approx(0.08 * 255, rel=0.03)
    assert difference.mean() == pytest.approx(-0.5, abs=0.6)  # cut to whole numbers
    assert np.abs(np.corrcoef(difference[:, :-1].ravel(), difference[:, 1:].ravel())[0, 1]) < 0.03
    channels = np.corrcoef(difference.reshape(-1, 3).T)
    assert np.abs(channels - np.eye(3)).max() < 0.05


def test_noise_stays_within_8_bits():
    with rng.seeded(0):
        for value in (0, 255):
            sample = SampleInput(np.full((40, 40, 3), value, np.uint8), np.zeros((0, 4)), True)
            NoiseWhereSmall(1.0, 0.08)(sample)
            assert (sample.image == value).mean() == pytest.approx(0.5, abs=0.1)
            assert np.abs(sample.image.astype(int) - value).max() < 130


def test_crops_have_their_sizes_and_places():
    crop, sides, corners = CropWhereLarge(0.8), [], []
    boxes = np.array([[20.0, 10, 80, 50]])
    with rng.seeded(2):
        for _ in range(300):
            sample = SampleInput(GREY, boxes.copy(), False)
            window = crop(sample)
            assert isinstance(window, Window)
            assert sample.image.shape == (window.h, window.w, 3)
            moved = boxes - [window.x0, window.y0] * 2
            assert np.array_equal(sample.boxes, moved)
            assert window.x0 + window.w <= 100 and window.y0 + window.h <= 60
            sides.append((window.w / 100, window.h / 60))
            corners.append((window.x0, window.y0))
    sides = np.array(sides)
    assert sides.min() >= 0.79 and sides.max() <= 1.0  # whole pixels
    assert sides.mean(axis=0) == pytest.approx([0.9, 0.9], abs=0.015)
    assert abs(np.corrcoef(sides.T)[0, 1]) < 0.2  # independent
    assert np.min(corners) == 0 and np.max(corners, axis=0).tolist() > [10, 5]


def test_a_crop_shows_an_object_or_is_not_made(monkeypatch):
    corner = np.array([[0.0, 0, 3, 3], [97, 57, 100, 60]])
    with rng.seeded(3):
        for boxes in (corner[:1], corner[1:]):
            for _ in range(100):
                sample = SampleInput(GREY, boxes.copy(), False)
                CropWhereLarge(0.8)(sample)
                height, width = sample.image.shape[:2]
                cut = sample.boxes.clip(0, [width, height] * 2)
                assert (cut[:, 2:] > cut[:, :2]).all()
    # A box that no crop can show: it ends, and the image stays whole.
    draws = []
    own = T.RandomCrop.get_transform
    monkeypatch.setattr(
        T.RandomCrop, "get_transform", lambda self, x: draws.append(1) or own(self, x)
    )
    outside = SampleInput(GREY, np.array([[200.0, 200, 300, 300]]), False)
    assert isinstance(CropWhereLarge(0.8)(outside), T.NoOpTransform)
    assert len(draws) == augmentation.MOST_DRAWS
    small = SampleInput(GREY, corner.copy(), True)
    assert isinstance(CropWhereLarge(0.8)(small), T.NoOpTransform) and small.image is GREY


def test_polygons_are_moved_and_cut_where_they_become_pixels():
    window = Window(10, 20, 50, 30)
    square = np.array([[0.0, 0], [40, 0], [40, 40], [0, 40]])
    (moved,) = window.apply_polygons([square.copy()])
    assert moved.tolist() == [[-10, -20], [30, -20], [30, 20], [-10, 20]]
    masks = PolygonMasks([[moved.ravel()]])
    inside = masks.crop_and_resize(torch.tensor([[0.0, 0, 30, 20]]), 10)
    assert inside.all()


def augmented_cfg(tmp_path, opts=()):
    """Images 0, 2, 4 have a large object, the others only small ones."""
    training_cfg(tmp_path)
    path = tmp_path / "data" / "data.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        large = entry["image_id"] % 2 == 0 and entry["id"] % 2
        entry["bbox"] = [4, 6, 50, 50] if large else [6, 8, 20, 20]
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    path.write_text(json.dumps(content))
    on = ("INPUT.SAMPLE_SPECIFIC.ENABLED", True, "INPUT.SAMPLE_SPECIFIC.NOISE_PROB", 1.0)
    return training_cfg(tmp_path, opts=(*on, *opts))


def flat(batches):
    return list(itertools.chain(*batches))


def is_large(sample):
    return int(Path(sample["file_name"]).stem) % 2 == 0


def test_samples_of_a_stream(tmp_path):
    cfg = augmented_cfg(tmp_path)
    plain = cfg.clone()
    plain.INPUT.SAMPLE_SPECIFIC.ENABLED = False
    samples, before = (flat(take(build_train_stream(x), 8)) for x in (cfg, plain))
    assert names([samples]) == names([before])
    cropped = 0
    for sample in samples:
        height, width = sample["image"].shape[-2:]
        boxes = sample["instances"].gt_boxes.tensor
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
        assert sample["instances"].image_size == (height, width) and len(boxes)
        # Whole images are 2:3 with a shorter side of 48 to 64 pixels.
        whole = (min(height, width), max(height, width)) in {(x, round(1.5 * x)) for x in (48, 64)}
        cropped += not whole
        assert (is_large(sample) or whole) and sample["image"].dtype == torch.uint8
    assert cropped > 5


def test_the_stream_is_a_function_of_the_seed_for_any_number_of_workers(tmp_path):
    cfg = augmented_cfg(tmp_path, ("INPUT.PLAIN_FROM", 5))
    expected = take(build_train_stream(cfg, second_images=True), 8)
    for workers, start in ((2, 0), (0, 3), (2, 6)):
        other = cfg.clone()
        other.DATALOADER.NUM_WORKERS = workers
        stream = build_train_stream(other, second_images=True)
        stream.start = start
        torch.rand(3), np.random.rand(3)
        found = take(stream, 8 - start)
        assert_same_batches(found, expected[start:])
        for a, b in zip(flat(found), flat(expected[start:])):
            assert ("second_image" in a) == ("second_image" in b)
            if "second_image" in a:
                assert torch.equal(a["second_image"], b["second_image"])
    firsts = build_train_stream(cfg, second_images=True).first_batches(7)
    assert_same_batches(firsts, expected[:7])


def test_from_plain_from_on_it_is_the_plain_stream(tmp_path):
    cfg = augmented_cfg(tmp_path, ("INPUT.PLAIN_FROM", 5))
    plain = augmented_cfg(tmp_path, ("INPUT.SAMPLE_SPECIFIC.ENABLED", False))
    found = take(build_train_stream(cfg, second_images=True), 9)
    wanted = take(build_train_stream(plain), 9)
    assert_same_batches(found[5:], wanted[5:])
    assert ["second_image" in x for x in flat(found)] == [True] * 10 + [False] * 8
    changed = [a["image"].shape != b["image"].shape for a, b in zip(flat(found), flat(wanted))]
    assert any(changed[:10]), "vacuous: nothing was cropped"


def second_folder(tmp_path, change=lambda pixels: 255 - pixels, suffix=".png"):
    """A folder with a changed copy of each image."""
    folder = tmp_path / "second"
    folder.mkdir(exist_ok=True)
    for path in (tmp_path / "data" / "images").iterdir():
        pixels = np.asarray(Image.open(path))
        Image.fromarray(change(pixels)).save(folder / (path.stem + suffix))
    return folder


def test_second_images_follow_the_first_ones_geometry_without_noise(tmp_path):
    opts = ("INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", (0.8, 0.8))
    cfg = augmented_cfg(tmp_path, opts)
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(second_folder(tmp_path, lambda x: x))
    noisy = 0
    for sample in flat(take(build_train_stream(cfg, second_images=True), 8)):
        assert "second_file_name" not in sample
        if is_large(sample):  # the same pixels, so the same image
            assert torch.equal(sample["image"], sample["second_image"])
        else:
            difference = sample["image"].float() - sample["second_image"].float()
            assert 5 < difference.std() < 25
            noisy += 1
    assert noisy > 3
    cfg.INPUT.SAMPLE_SPECIFIC.ENABLED = False
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(second_folder(tmp_path))
    for sample in flat(take(build_train_stream(cfg, second_images=True), 4)):
        total = sample["image"].int() + sample["second_image"].int()
        assert (total - 255).abs().max() <= 2  # the resize rounds each of its two passes


def test_second_images_are_not_read_unless_asked_for(tmp_path):
    cfg = training_cfg(tmp_path)
    cfg.DATASETS.TRAIN_SECOND_IMAGES = "/nowhere"
    samples = flat(take(build_train_stream(cfg), 2))
    assert not any(x for sample in samples for x in sample if "second" in x)


def test_missing_and_wrong_second_images_are_named(tmp_path):
    cfg = training_cfg(tmp_path)
    cfg.DATASETS.TRAIN_SECOND_IMAGES = ""
    with pytest.raises(UserError, match="TRAIN_SECOND_IMAGES names no folder"):
        build_train_stream(cfg, second_images=True)
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        build_train_stream(cfg, second_images=True)
    folder = second_folder(tmp_path)
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(folder)
    (folder / "3.png").unlink()
    (folder / "4.png").unlink()
    with pytest.raises(UserError, match=r"no second image of 2 of 6 .*the first is 3.png"):
        build_train_stream(cfg, second_images=True)
    second_folder(tmp_path, lambda x: x[1:])
    with pytest.raises(
        BadImage, match=r"second/\d.png is of (96x63|64x95) pixels, .*(96x64|64x96)"
    ):
        take(build_train_stream(cfg, second_images=True), 6)


def test_names_below_the_image_folder_and_lossless_ones(tmp_path):
    """photos/a.jpg has its second image in second/photos/a.png."""
    training_cfg(tmp_path)
    data = tmp_path / "data"
    content = json.loads((data / "data.json").read_text())
    (data / "images" / "sub").mkdir()
    (data / "images" / "0.png").rename(data / "images" / "sub" / "1.jpg")  # 1.png is another one
    content["images"][0]["file_name"] = "sub/1.jpg"
    (data / "data.json").write_text(json.dumps(content))
    folder = tmp_path / "second"
    (folder / "sub").mkdir(parents=True)
    for name in ("sub/1.jpg", *(f"{i}.png" for i in range(1, 6))):
        target = folder / (name[:-4] + ".png")
        Image.open(data / "images" / name).convert("RGB").save(target)
    cfg = training_cfg(tmp_path)
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(folder)
    stream = build_train_stream(cfg, second_images=True)
    found = {Path(x["file_name"]).name: x["second_file_name"] for x in stream.dicts}
    assert found["1.jpg"] == str(folder / "sub" / "1.png")
    assert found["1.png"] == str(folder / "1.png")
    for sample in flat(take(stream, 6)):
        assert torch.equal(sample["image"], sample["second_image"])
    # Two images, one lossless name.
    (data / "images" / "5.png").rename(data / "images" / "4.jpg")
    content["images"][5]["file_name"] = "4.jpg"
    (data / "data.json").write_text(json.dumps(content))
    cfg = training_cfg(tmp_path)
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(folder)
    with pytest.raises(UserError, match="4.png in .*second.*images/4.png and of .*images/4.jpg"):
        build_train_stream(cfg, second_images=True)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("INPUT.SAMPLE_SPECIFIC.NOISE_PROB", 1.5, "NOISE_PROB: 1.5 is not a probability"),
        ("INPUT.SAMPLE_SPECIFIC.CROP", 0.0, "CROP: 0.0 is not above 0 and at most 1"),
        ("INPUT.SAMPLE_SPECIFIC.CROP", 1.1, "CROP: 1.1 is not above 0 and at most 1"),
        ("INPUT.SAMPLE_SPECIFIC.SMALL_AREA", -1.0, "SMALL_AREA: -1.0 is not a finite number"),
        ("INPUT.SAMPLE_SPECIFIC.NOISE_SIGMA", float("inf"), "NOISE_SIGMA: inf is not a finite"),
        ("INPUT.PLAIN_FROM", -1, "INPUT.PLAIN_FROM: -1 is not an iteration, or 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(key, value, message):
    cfg = get_fgd_cfg()
    check_config(cfg)
    cfg.merge_from_list([key, value])
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(UserError, match=message):
        check_config(cfg)


def test_a_mask_rcnn_takes_crops(tmp_path):
    cfg = augmented_cfg(tmp_path, ("INPUT.SAMPLE_SPECIFIC.CROP", 0.5))
    path = tmp_path / "data" / "data.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    path.write_text(json.dumps(content))
    for kind in ("polygon", "bitmask"):
        opts = ("MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", kind)
        masked = training_cfg(tmp_path, opts=opts)
        masked.INPUT.SAMPLE_SPECIFIC = cfg.INPUT.SAMPLE_SPECIFIC
        for sample in flat(take(build_train_stream(masked), 6)):
            found = sample["instances"]
            assert len(found)
            size = 16
            inside = found.gt_masks.crop_and_resize(found.gt_boxes.tensor, size)
            assert inside.float().mean() > 0.85  # rectangles fill their boxes, cut or not
