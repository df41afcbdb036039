import json
import math
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.errors import UserError
from deploy.spec import ModelSpec


def _spec(**changes):
    values = {
        "architecture": "RetinaNet",
        "classes": ["kreis", "größe", "a,b"],
        "input_format": "BGR",
        "input_dtype": "uint8",
        "min_size": 96,
        "max_size": 128,
        "size_divisibility": 32,
        "height": 96,
        "width": 128,
        "dynamic": "batch",
        "max_detections": 100,
        "score_threshold": 0.05,
        "nms_threshold": 0.5,
        "mean": [103.53, 116.28, 123.675],
        "std": [1.0, 1.0, 1.0],
        "opset": 18,
        "hashes": {"checkpoint_sha256": "ab", "graph_sha256": "cd"},
        "versions": {"torch": "2.11.0"},
    }
    return ModelSpec(**{**values, **changes})


def test_json_round_trip(tmp_path):
    spec = _spec()
    spec.to_json(tmp_path / "model.json")
    assert ModelSpec.from_json(tmp_path / "model.json") == spec
    values = json.loads((tmp_path / "model.json").read_text())
    values["contract"] = values.pop("interface")  # as in files of before
    (tmp_path / "model.json").write_text(json.dumps(values))
    assert ModelSpec.from_json(tmp_path / "model.json") == spec


def test_the_json_tells_readers_the_interface(tmp_path):
    _spec(height=None, width=None, dynamic="image").to_json(tmp_path / "model.json")
    interface = json.loads((tmp_path / "model.json").read_text())["interface"]
    assert interface["inputs"]["images"]["shape"] == ["batch", 3, "height", "width"]
    assert interface["resize"] == "PIL bilinear, shortest side 96, longest at most 128"
    assert _spec(min_size=0).interface()["resize"] == "none"
    assert _spec(dynamic="none").interface()["outputs"]["boxes"]["shape"] == [1, 100, 4]


def test_masks_are_a_fifth_output():
    spec = _spec(task="instance_segmentation", mask_size=28)
    assert spec.output_names == (*_spec().output_names, "masks")
    masks = spec.interface()["outputs"]["masks"]
    assert (masks["dtype"], masks["shape"]) == ("float32", ["batch", 100, 28, 28])
    assert "masks" not in _spec().interface()["outputs"]


@pytest.mark.parametrize("canvas", [(96, 128, "batch"), (None, None, "image")])
def test_metadata_round_trip_without_the_graph_hash(canvas):
    spec = _spec(height=canvas[0], width=canvas[1], dynamic=canvas[2])
    metadata = spec.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    expected = replace(spec, hashes={"checkpoint_sha256": "ab"})
    assert ModelSpec.from_metadata({**metadata, "somebody": "else"}) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"input_format": "GRAY"},
        {"input_dtype": "float16"},
        {"dynamic": "yes"},
        {"classes": []},
        {"height": None},
        {"dynamic": "image"},
        {"format": "fgd-onnx-0"},
        {"mask_size": 28},
        {"task": "instance_segmentation"},
        {"classes": "circle"},
        {"classes": ["a", 1]},
        {"min_size": "96"},
        {"min_size": True},
        {"max_size": 10**400},
        {"score_threshold": math.inf},
        {"nms_threshold": math.nan},
        {"mean": [1.0, None]},
        {"size_divisibility": -32},
        {"width": 0},
        {"filled": 1},
        {"hashes": {"graph_sha256": 5}},
        {"versions": []},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_impossible_values_are_refused(changes):
    with pytest.raises(UserError):
        _spec(**changes)


@pytest.mark.parametrize("text", ["", "<html>", "[]", "{}", '{"task": "detection"}'])
def test_foreign_json_is_refused(tmp_path, text):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(UserError, match="model"):
        ModelSpec.from_json(path)


def test_missing_file_foreign_and_damaged_metadata_are_refused(tmp_path):
    with pytest.raises(UserError, match="nothing.json"):
        ModelSpec.from_json(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="export.py"):
        ModelSpec.from_metadata({})
    with pytest.raises(UserError, match="damaged"):
        ModelSpec.from_metadata({**_spec().to_metadata(), "mean": "[1, 2"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=2), inside),
    max_leaves=5,
) | st.sampled_from([10**400, -1, 0, 1, 65_535, 65_536, "BGR", "fp16", [""], ["a"], {"a": "b"}])
NAMES = st.sampled_from([f.name for f in fields(ModelSpec)])


@settings(max_examples=int(os.environ.get("FUZZ_FIELDS", 200)), deadline=None)
@given(st.dictionaries(NAMES, JSON, min_size=1, max_size=3))
def test_any_value_of_any_field_is_read_or_refused_in_one_line(changes):
    """By both ways in; what is read has a interface, whose shapes and types can be relied on."""
    values = {**asdict(_spec()), **changes}
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.json")
        path.write_text(json.dumps(values))
        for read in (lambda: ModelSpec.from_json(path), lambda: ModelSpec.from_metadata(metadata)):
            try:
                spec = read()
            except UserError as error:
                assert len(str(error)) < 700
                continue
            json.dumps(spec.interface(), allow_nan=False)
            assert all(type(name) is str for name in spec.classes)
            assert 0 <= spec.min_size <= 65_535 and spec.height != 0


def test_a_deep_file_is_one_line(tmp_path):
    path, deep = tmp_path / "model.json", "[" * 100_000
    path.write_text(f'{{"classes": {deep}')
    with pytest.raises(UserError, match="model.json is nested too deeply"):
        ModelSpec.from_json(path)
    with pytest.raises(UserError, match="metadata is damaged"):
        ModelSpec.from_metadata({**_spec().to_metadata(), "mean": deep})
    with pytest.raises(UserError, match="metadata is damaged"):
        ModelSpec.from_metadata({**_spec().to_metadata(), "mean": ["text expected"]})


def test_json_is_stable(tmp_path):
    _spec().to_json(tmp_path / "a.json")
    keys = list(json.loads((tmp_path / "a.json").read_text(encoding="utf-8")))
    assert keys == sorted(keys)


def _without(name, folder):
    """A model.json that lacks one field."""
    path = folder / "model.json"
    _spec().to_json(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    del values[name]
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["precision", "target", "mask_size", "proposals", "task"])
def test_files_from_before_a_field_with_a_default_are_read(name, tmp_path):
    assert ModelSpec.from_json(_without(name, tmp_path)) == _spec()


@pytest.mark.parametrize("name", ["format", "classes", "score_threshold"])
def test_all_other_fields_must_be_there(name, tmp_path):
    with pytest.raises(UserError, match=rf"missing \['{name}'\]"):
        ModelSpec.from_json(_without(name, tmp_path))
