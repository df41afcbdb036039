"""The pixels a client feeds are Detectron2's; what cannot be read right is refused."""

import struct
from zlib import compress, crc32

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from deploy.errors import UserError
from deploy.serving.preprocess import load_image, make_batch, prepare, resized_shape

from .fake_graph import fake_spec


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1000), st.integers(1, 2000))
def test_resized_shape_is_detectron2s(height, width, min_size, max_size):
    expected = T.ResizeShortestEdge.get_output_shape(height, width, min_size, max_size)
    assert resized_shape(height, width, min_size, max_size) == expected


@pytest.mark.parametrize(
    "size, expected",
    [
        ((480, 640), (800, 1067)),  # fits: as without a canvas
        ((640, 480), (800, 600)),  # portrait: 1067x800 does not fit, shrunk to the canvas' height
        ((100, 4000), (33, 1333)),
        ((4000, 100), (800, 20)),
    ],
)
def test_fixed_canvas_shrinks_and_never_crops(size, expected):
    assert resized_shape(*size, 800, 1333, canvas=(800, 1344)) == expected


def test_min_size_zero_keeps_the_size_unless_the_canvas_is_smaller():
    assert resized_shape(50, 70, 0, 0) == (50, 70)
    assert resized_shape(50, 70, 0, 0, canvas=(64, 96)) == (50, 70)
    assert resized_shape(100, 140, 0, 0, canvas=(64, 96)) == (64, 90)


@pytest.mark.parametrize("size", [(37, 91), (91, 37), (64, 64), (300, 200)])
@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_prepared_pixels_equal_detectron2s(size, order):
    image = noise(*size)
    source = image if order == "BGR" else image[:, :, ::-1]
    expected = T.ResizeShortestEdge([48, 48], 80).get_transform(source).apply_image(source)
    spec = fake_spec(
        input_format=order, min_size=48, max_size=80, dynamic="image", height=None, width=None
    )
    np.testing.assert_array_equal(prepare(image, spec), expected)


def test_too_thin_image_is_refused_with_both_sizes():
    with pytest.raises(UserError, match="1x4000.* 0x96"):
        prepare(noise(1, 4000), fake_spec())


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_batch_is_top_left_zero_padded_and_rounded_up(dtype):
    spec = fake_spec(dynamic="image", height=None, width=None, input_dtype=dtype)
    images = [noise(40, 33, 1), noise(20, 70, 2)]
    batch, sizes = make_batch(images, spec)
    assert batch.shape == (2, 3, 64, 96) and batch.dtype == dtype
    assert sizes.dtype == np.int32 and sizes.tolist() == [[40, 33], [20, 70]]
    for canvas, image, (h, w) in zip(batch, images, sizes, strict=True):
        np.testing.assert_array_equal(canvas[:, :h, :w].transpose(1, 2, 0), image)
        assert canvas.sum(dtype=np.int64) == image.sum(dtype=np.int64)


def save(image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_orientation_as_detectron2(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(noise(8, 16)), tmp_path / f"a{suffix}", exif=exif)
    np.testing.assert_array_equal(load_image(path), read_image(str(path), "BGR"))
    assert load_image(path).shape[:2] == ((8, 16) if orientation < 5 else (16, 8))


def test_oriented_tiff_is_turned_once(tmp_path):
    pixels = noise(8, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn clockwise to see it upright
    path = save(Image.fromarray(pixels), tmp_path / "a.tif", exif=exif)
    np.testing.assert_array_equal(load_image(path), np.rot90(pixels, -1)[:, :, ::-1])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes_are_converted_as_detectron2(tmp_path, mode):
    image = Image.fromarray(noise(6, 7)).convert(mode)
    path = save(image, tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    np.testing.assert_array_equal(load_image(path), read_image(str(path), "BGR"))
    assert load_image(image).shape == (6, 7, 3)


def test_transparent_pixels_keep_their_colour():
    red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert load_image(red)[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    "name, pixels",
    [
        ("I;16.png", np.full((4, 4), 300, np.uint16)),
        ("I;16.tif", np.full((4, 4), 300, np.uint16)),
        ("I.tif", np.full((4, 4), 70000, np.int32)),
        ("F.tif", np.full((4, 4), 0.5, np.float32)),
    ],
)
def test_more_than_eight_bits_are_refused(tmp_path, name, pixels):
    """Detectron2 clips them to 255: nearly all white, or for 0..1 floats all black."""
    path = save(Image.fromarray(pixels), tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: mode '{name[:-4]}' is not 8 bits"):
        load_image(path)


def png(header, rows):
    """A PNG file from its IHDR (width, height, depth, colour type) and its unfiltered rows."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    ihdr = struct.pack(">IIBBBBB", *header, 0, 0, 0)
    data = compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("colour, channels", [(2, 3), (6, 4)], ids=["RGB", "RGBA"])
def test_sixteen_bit_colour_png_keeps_the_high_bytes(tmp_path, colour, channels):
    """Pillow reads these as 8 bits, which is right, and so does Detectron2."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 6, channels)).astype(">u2")
    path = tmp_path / "deep.png"
    path.write_bytes(png((6, 5, 16, colour), [row.tobytes() for row in values]))
    pixels = load_image(path)
    np.testing.assert_array_equal(pixels[:, :, ::-1], values[:, :, :3] >> 8)
    np.testing.assert_array_equal(pixels, read_image(str(path), "BGR"))


def test_lab_is_refused_and_ycbcr_converted(tmp_path):
    image = Image.fromarray(noise(6, 7))
    path = save(image.convert("YCbCr"), tmp_path / "a.tif")
    np.testing.assert_array_equal(load_image(path), read_image(str(path), "BGR"))
    path = save(Image.new("LAB", (4, 4)), tmp_path / "lab.tif")
    with pytest.raises(UserError, match=r"lab\.tif: mode 'LAB'"):
        load_image(path)


def test_transparent_palette_as_detectron2(tmp_path):
    image = Image.fromarray(noise(6, 7)).convert("P")
    path = save(image, tmp_path / "a.png", transparency=3)
    assert "transparency" in Image.open(path).info
    np.testing.assert_array_equal(load_image(path), read_image(str(path), "BGR"))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_senseless_orientation_is_ignored(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(noise(8, 16)), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_image(path), noise(8, 16)[:, :, ::-1])


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp"])
def test_of_many_frames_the_first_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(1, 5)]
    path = save(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert Image.open(path).n_frames == 4
    assert abs(int(load_image(path)[0, 0, 2]) - 40) <= 2  # WebP is lossy


def test_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    """The name, and the size or Pillow's own words about it."""
    path = save(Image.new("1", (16384, 16384)), tmp_path / "bomb.png")
    assert path.stat().st_size < 50_000
    with pytest.raises(UserError, match=r"bomb\.png exceeds 89478485 pixels: .*268435456"):
        load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UserError, match=r"bomb\.png: 16384x16384 is more than 89478485 pix"):
        load_image(path)
    with pytest.raises(UserError, match="20x10 is more than 199"):
        load_image(Image.new("L", (20, 10)), max_pixels=199)
    assert load_image(Image.new("L", (20, 10)), max_pixels=200).shape == (10, 20, 3)


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused(tmp_path):
    """PNG's compressed text: 100 MB of zeros in 100 kB, read before the pixels."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "0" * 100_000_000, zip=True)
    path = save(Image.new("L", (4, 4)), tmp_path / "text.png", pnginfo=info)
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match=r"text\.png: .*too large"):
        load_image(path)


def test_sizes_that_would_not_fit_into_memory_are_refused():
    spec = fake_spec(min_size=60_000, max_size=65_535, dynamic="image", height=None, width=None)
    with pytest.raises(UserError, match="would be resized to 49151x65535, more than 89478485"):
        prepare(np.zeros((60, 80, 3), np.uint8), spec)


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_foreign_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"photo\.jpg"):
        load_image(path)


def test_missing_and_truncated_files_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jpg"):
        load_image(tmp_path / "gone.jpg")
    path = save(Image.fromarray(noise(64, 64)), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(UserError, match=r"cut\.jpg.*truncated"):
        load_image(path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),  # 0..1 or 0..255? better asked than guessed
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_of_another_layout_are_refused(array):
    with pytest.raises(UserError, match="pass"):
        load_image(array)
