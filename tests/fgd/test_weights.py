import os
import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling.backbone import BasicStem
from torch import nn

from fgd.errors import UserError
from fgd.weights import load_complete, read_weights, weights_sha256


class Payload:
    """Pickles to a call of os.system that would leave a marker file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def make_model():
    model = nn.Sequential()
    model.add_module("backbone", nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    model.add_module("head", nn.Linear(2, 3))
    return model


@pytest.fixture
def model():
    return make_model()


def save(path, content):
    torch.save(content, path)
    return str(path)


def save_pickle(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


def arrays(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


# Reading


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x, "iteration": 4}])
def test_pth_with_and_without_envelope(tmp_path, model, wrap):
    path = save(tmp_path / "m.pth", wrap(model.state_dict()))
    checkpoint = read_weights(path)
    assert torch.equal(checkpoint["model"]["head.weight"], model.head.weight)
    assert checkpoint.get("iteration") in (4, None)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_zoo_pickle(tmp_path, model, protocol):
    content = {"model": arrays(model), "__author__": "Zoo", "scale": np.float32(2)}
    checkpoint = read_weights(save_pickle(tmp_path / "m.pkl", content, protocol))
    expected = model.head.weight.detach().numpy()
    np.testing.assert_array_equal(checkpoint["model"]["head.weight"], expected)
    assert checkpoint["scale"] == 2 and "matching_heuristics" not in checkpoint


def test_caffe2_pickle_is_marked_for_renaming(tmp_path):
    blobs = {"conv1_w": np.ones(3, np.float32), "conv1_w_momentum": np.ones(3, np.float32)}
    checkpoint = read_weights(save_pickle(tmp_path / "m.pkl", {"blobs": blobs}))
    assert list(checkpoint["model"]) == ["conv1_w"]
    assert checkpoint["matching_heuristics"] and checkpoint["__author__"] == "Caffe2"


def test_pickle_of_numpy_1_is_read(tmp_path):
    """numpy 1 wrote numpy.core where numpy 2 writes numpy._core."""
    data = pickle.dumps({"model": {"x": np.arange(3.0)}, "__author__": "Zoo"}, protocol=0)
    path = tmp_path / "m.pkl"
    path.write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    assert read_weights(str(path))["model"]["x"].tolist() == [0, 1, 2]


def test_pycls_file(tmp_path):
    state = {"stem.conv.weight": torch.ones(1), "stem.bn.num_batches_tracked": torch.ones(1)}
    checkpoint = read_weights(save(tmp_path / "m.pyth", {"model_state": state}))
    assert list(checkpoint["model"]) == ["stem.conv.weight"] and checkpoint["matching_heuristics"]


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth", "evil.pyth", "raw.pth"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, name):
    marker = tmp_path / "ran"
    content = {"model": {"x": Payload(marker)}, "__author__": "Zoo"}
    write = save if name.startswith("evil.p") and name != "evil.pkl" else save_pickle
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=r"refused: contains code or objects \((posix|os)\.system"):
        read_weights(path)
    assert not marker.exists()


def test_other_pickle_tricks_are_refused(tmp_path):
    for name, content in {
        "builtins.pkl": b"cbuiltins\neval\n(S'1'\ntR.",
        "submodule.pkl": b"\x80\x04\x8c\x05numpy\x8c\x14testing.runstring\x93.",
        "codec.pkl": b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match="refused|damaged"):
            read_weights(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "the file is empty"),
        ("a.pkl", b"", "the file is empty"),
        ("a.pth", b"\n<!DOCTYPE html><html>404", "this is a web page"),
        ("a.pkl", b"<html>", "this is a web page"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("a.pth", b"some notes", "damaged or not a PyTorch file"),
        ("a.pkl", b"some notes", "damaged or not a pickle"),
        ("a.pkl", pickle.dumps([1]), "expected a dict of weights, found a list"),
        ("a.pkl", pickle.dumps({}), "holds no weights"),
        ("a.pkl", pickle.dumps({"lr": 3}), "'lr' is a int"),
    ],
)
def test_foreign_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_weights(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_empty_paths():
    with pytest.raises(UserError, match="no weight file given"):
        read_weights("")
    with pytest.raises(UserError, match="/nowhere/m.pth: cannot read"):
        read_weights("/nowhere/m.pth")
    with pytest.raises(UserError, match="catalog://NoSuchModel: cannot read"):
        read_weights("catalog://NoSuchModel")


def test_hash_of_a_file_under_any_address(tmp_path):
    (tmp_path / "m.pkl").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert weights_sha256(str(tmp_path / "m.pkl")) == expected
    assert weights_sha256(f"{tmp_path / 'm.pkl'}?matching_heuristics=True") == expected
    with pytest.raises(UserError, match="cannot read"):
        weights_sha256("/nowhere/m.pth")


def test_mmdetection_file_is_recognised(tmp_path):
    path = save(tmp_path / "m.pth", {"meta": {"epoch": 1}, "state_dict": {"x": torch.ones(1)}})
    with pytest.raises(UserError, match="MMDetection"):
        read_weights(path)


def test_every_truncation_and_flipped_bit_is_noticed(tmp_path, model):
    """torch.load alone reads flipped bits without a word."""
    path = tmp_path / "m.pth"
    torch.save(model.state_dict(), path)
    good = path.read_bytes()
    weight = model.head.weight.detach().numpy().tobytes()
    position = good.index(weight)
    flipped = bytearray(good)
    flipped[position + 3] ^= 0x40
    for content in (good[: len(good) // 2], good[:-10], good[:10], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            read_weights(str(path))


# Loading


def test_complete_file_loads(tmp_path, model):
    path = save(tmp_path / "m.pth", {"model": model.state_dict(), "iteration": 7})
    other = make_model()
    report = load_complete(other, path)
    assert torch.equal(other.head.weight, model.head.weight)
    assert report.loaded == 8 and report.iteration == 7
    assert not report.missing + report.mismatched + report.unexpected + report.nonfinite


def test_zoo_file_with_short_names_is_matched_like_detectron2_does(tmp_path, model):
    content = {name.removeprefix("backbone."): value for name, value in arrays(model).items()}
    content = {"model": content, "__author__": "Zoo", "matching_heuristics": True}
    other = make_model()
    assert load_complete(other, save_pickle(tmp_path / "m.pkl", content)).loaded == 8
    assert torch.equal(other.backbone[0].weight, model.backbone[0].weight)


def test_caffe2_backbone_is_renamed_like_detectron2_does(tmp_path):
    """The ImageNet files of the model zoo: short names, affine batch norm without statistics."""
    generator = np.random.default_rng(0)
    blobs = {"conv1_w": (8, 3, 7, 7), "res_conv1_bn_s": (8,), "res_conv1_bn_b": (8,)}
    blobs = {k: generator.normal(size=shape).astype(np.float32) for k, shape in blobs.items()}
    model = nn.ModuleDict({"stem": BasicStem(3, 8, norm="FrozenBN"), "head": nn.Linear(1, 1)})
    path = save_pickle(tmp_path / "R-50.pkl", blobs)
    report = load_complete(model, path, what="student", allow_partial=True)
    assert report.missing == ["head.bias", "head.weight"] and report.loaded == 5
    conv = model["stem"].conv1
    np.testing.assert_array_equal(conv.weight.detach(), blobs["conv1_w"])
    np.testing.assert_array_equal(conv.norm.weight, blobs["res_conv1_bn_s"])
    assert conv.norm.running_mean.abs().max() == 0


def test_heuristics_can_be_asked_for_in_the_address(tmp_path, model):
    state = {k.removeprefix("backbone."): v for k, v in model.state_dict().items()}
    path = save(tmp_path / "m.pth", state)
    with pytest.raises(UserError, match="6 not in the file"):
        load_complete(make_model(), path, allow_partial=False)
    assert load_complete(make_model(), path + "?matching_heuristics=True").loaded == 8


def test_batch_norm_counters_and_shared_tensors_are_not_missed(tmp_path, model):
    model.add_module("tied", model.head)
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith("tied") and "num_batches" not in name
    }
    assert not load_complete(model, save(tmp_path / "m.pth", state)).missing


CASES = {
    "missing": (lambda s: [s.pop("head.weight"), s.pop("head.bias")], "2 not in the file .*head"),
    "shape": (
        lambda s: s.update({"head.bias": torch.ones(5)}),
        r"1 of another shape \(head.bias \(5,\) in the file, \(3,\) in the model",
    ),
    "nan": (lambda s: s["head.bias"].fill_(torch.nan), r"1 with NaN or infinite .*head.bias"),
    "inf": (lambda s: s["head.bias"].fill_(torch.inf), r"1 with NaN or infinite .*head.bias"),
}


@pytest.mark.parametrize("case", CASES)
def test_incomplete_files_are_refused_unless_allowed(tmp_path, model, case):
    change, message = CASES[case]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    change(state)
    path = save(tmp_path / "m.pth", state)
    with pytest.raises(UserError, match=f"teacher weights .*{message}"):
        load_complete(make_model(), path)
    if case in ("nan", "inf"):  # never useful
        with pytest.raises(UserError, match="NaN"):
            load_complete(make_model(), path, allow_partial=True)
    else:
        report = load_complete(make_model(), path, allow_partial=True)
        assert report.loaded == {"missing": 6, "shape": 7}[case]


def test_file_without_one_fitting_tensor_is_refused_even_if_partial(tmp_path, model):
    path = save(tmp_path / "m.pth", {"other.weight": torch.ones(3)})
    with pytest.raises(UserError, match="student weights .* 0 tensors loaded, 8 not in the file"):
        load_complete(model, path, what="student", allow_partial=True)


def test_a_backbone_alone_is_not_complete(tmp_path, model):
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone")}
    path = save(tmp_path / "m.pth", state)
    assert load_complete(make_model(), path, allow_partial=True).loaded == 6
    with pytest.raises(UserError, match="2 not in the file"):
        load_complete(make_model(), path)
