import os
import random
import zipfile

import pytest
import torch

from fgd.errors import UserError
from fgd.files import atomic_write, check_seal, save_sealed
from fgd.weights import read_weights


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(str(path), fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "m.pth"
    data = {"model": {"w": torch.randn(40, 50), "b": torch.zeros(3)}, "checksum": "sha256"}
    atomic_write(str(path), lambda file: save_sealed(data, file))
    return path


def test_sealed_files_are_ordinary_archives(sealed):
    assert check_seal(str(sealed))
    for mmap in (False, True):
        data = torch.load(sealed, weights_only=True, mmap=mmap)
        assert data["model"]["w"].shape == (40, 50)
    with zipfile.ZipFile(sealed) as archive:
        assert archive.testzip() is None
        assert len(archive.comment) == 75 and archive.comment.startswith(b"fgd-sha256:")


def test_a_flipped_bit_anywhere_is_found(sealed):
    """200 random places, and every byte of what no checksum of the zip format covers."""
    good = sealed.read_bytes()
    end = good.rindex(b"PK\x05\x06")
    places = random.Random(0).sample(range(len(good)), 200)
    for place in {*places, *range(64), *range(end, len(good))}:
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        sealed.write_bytes(damaged)
        with pytest.raises(UserError, match="m.pth: (damaged|not a|this)"):
            read_weights(str(sealed))
    for length in (0, 1, 60, len(good) // 2, end, len(good) - 1):
        sealed.write_bytes(good[:length])
        with pytest.raises(UserError):
            read_weights(str(sealed))
    sealed.write_bytes(good)
    assert read_weights(str(sealed))["model"]["b"].tolist() == [0, 0, 0]


def test_the_zip_checksums_alone_would_miss_some(sealed):
    """Why there is a SHA-256: with the comment cut off, flips in padding pass."""
    good = sealed.read_bytes()
    end = good.rindex(b"PK\x05\x06") + 22
    bare = good[: end - 2] + b"\0\0"
    missed = 0
    for place in random.Random(0).sample(range(len(bare)), 200):
        damaged = bytearray(bare)
        damaged[place] ^= 1
        sealed.write_bytes(damaged)
        try:
            with zipfile.ZipFile(sealed) as archive:
                missed += archive.testzip() is None
        except (zipfile.BadZipFile, RuntimeError, OSError):
            pass
    assert missed > 0


def test_files_without_a_seal_are_told_apart(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"model": {"w": torch.ones(1)}}, path)
    assert check_seal(str(path)) is False
    assert read_weights(str(path))["model"]["w"].tolist() == [1]
    path.write_bytes(b"short")
    assert check_seal(str(path)) is False
