"""The build of Detectron2: a patch that does not apply stops it; missing operations say so."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "third_party" / "detectron2"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path):
    """A tree with exactly the texts that the patches expect."""
    patches = load("patches")
    for name, expected, _ in patches.PATCHES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + expected + "\n")
    for name, uses in patches.NUMPY_ALIAS_USES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("np.int " * uses + "np.int64 np.floating np.bool_")
    return tmp_path


def test_all_patches_apply(source):
    load("patches").apply_patches(source)
    assert "Image.BILINEAR" in (source / "data/transforms/transform.py").read_text()
    text = (source / "structures/masks.py").read_text()
    assert text.split() == ["int"] * 3 + ["np.int64", "np.floating", "np.bool_"]


@pytest.mark.parametrize("text", ["", "interp=Image.LINEAR interp=Image.LINEAR"])
def test_a_text_that_is_missing_or_twice_stops_the_build(source, text):
    (source / "data/transforms/transform.py").write_text(text)
    with pytest.raises(RuntimeError, match="transform.py: expected once, found [02]"):
        load("patches").apply_patches(source)


def test_a_numpy_alias_that_was_not_counted_stops_the_build(source):
    (source / "data/build.py").write_text("np.int")
    with pytest.raises(RuntimeError, match="data/build.py: expected 2 .* found 1"):
        load("patches").apply_patches(source)


def test_a_missing_operation_is_named():
    stand_in = load("_C")
    with pytest.raises(AttributeError, match="_C.box_iou_rotated is a compiled operation"):
        stand_in.box_iou_rotated(None, None)
    assert "pure-Python" in stand_in.get_compiler_version() and not stand_in.has_cuda()
