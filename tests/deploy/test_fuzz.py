"""Damaged image files: the command names each, crashes on none, and does the rest of the folder.

1,000 of them; FUZZ_IMAGES in the environment is another number, FUZZ_SEED gives other ones.
"""

import io
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from deploy import predict

from .fake_graph import write_fake_graph

COUNT = int(os.environ.get("FUZZ_IMAGES", 1000))
SEED = int(os.environ.get("FUZZ_SEED", 0))
MEMORY = 4 << 30  # bytes of address space, libraries included
KINDS = {
    "jpg": ("RGB", {"quality": 90}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "cmyk.jpg": ("CMYK", {}),
    "png": ("RGB", {}),
    "palette.png": ("P", {}),
    "alpha.png": ("RGBA", {}),
    "tif": ("RGB", {"compression": "raw"}),
    "lzw.tif": ("RGB", {"compression": "tiff_lzw"}),
    "jpeg.tif": ("RGB", {"compression": "jpeg"}),
    "webp": ("RGB", {}),
    "gif": ("P", {}),
    "bmp": ("RGB", {}),
}
SUFFIX_FORMATS = {"jpg": "JPEG", "tif": "TIFF"}


def seeds():
    """Name -> a small sound file of every kind, with EXIF orientation where the format has it."""
    rng = np.random.default_rng(7)
    picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, (mode, options) in KINDS.items():
        suffix, buffer = name.split(".")[-1], io.BytesIO()
        if suffix in ("jpg", "png", "webp"):
            options = {**options, "exif": exif}
        image = picture.convert(mode)
        image.save(buffer, SUFFIX_FORMATS.get(suffix, suffix.upper()), **options)
        yield name, buffer.getvalue()


def mutate(content, rng):
    """One of: bytes flipped anywhere, bytes flipped in the header, cut off, a part doubled."""
    damaged = bytearray(content)
    how = rng.integers(4)
    if how < 2:
        end = len(damaged) if how == 0 else min(len(damaged), 64)
        for where in rng.integers(0, end, rng.integers(1, 9)):
            damaged[where] = rng.integers(256)
    elif how == 2:
        del damaged[rng.integers(1, len(damaged)) :]
    else:
        start, end = sorted(rng.integers(0, len(damaged), 2))
        damaged[end:end] = damaged[start:end]
    return bytes(damaged)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """The command's exit code, output and report on a folder of mutants among sound images."""
    folder = tmp_path_factory.mktemp("fuzz")
    photos, rng, originals = folder / "photos", np.random.default_rng(SEED), list(seeds())
    photos.mkdir()
    for i in range(COUNT):
        name, content = originals[i % len(originals)]
        (photos / f"{i:05}.{name}").write_bytes(mutate(content, rng))
        if i % 10 == 0:
            (photos / f"{i:05}.sound.{name}").write_bytes(content)
    write_fake_graph(folder / "model.onnx")
    command = [sys.executable, predict.__file__, folder / "model.onnx", photos]
    done = subprocess.run(
        [*command, "--output", folder / "out", "--batch-size", "8", "--no-images"],
        capture_output=True,
        text=True,
        timeout=60 + COUNT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    return done, photos, json.loads((folder / "out" / "detections.json").read_text())


def test_no_mutant_crashes_the_command_and_the_exit_code_tells(fuzzed):
    done, _, report = fuzzed
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{len(report['failed'])} failed" in done.stdout


def test_every_file_is_either_done_or_named_with_its_reason(fuzzed):
    done, photos, report = fuzzed
    done_files = [entry["file"] for entry in report["images"]]
    failed = [entry["file"] for entry in report["failed"]]
    assert sorted(done_files + failed) == sorted(str(path) for path in photos.iterdir())
    assert len(failed) > COUNT // 5 and len(done_files) > COUNT // 5  # both kinds are there
    lines = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(lines) == len(failed)
    for line, entry in zip(lines, report["failed"]):
        assert entry["error"] and line == f"failed: {entry['file']}: {entry['error']}"


def test_the_sound_images_among_them_are_all_done(fuzzed):
    _, photos, report = fuzzed
    sound = {entry["file"]: entry for entry in report["images"] if ".sound." in entry["file"]}
    assert sorted(sound) == sorted(str(path) for path in photos.glob("*.sound.*"))
    turned = {(entry["height"], entry["width"]) for entry in sound.values()}
    assert turned <= {(24, 32), (32, 24)} and turned
