import onnx
import pytest
import torch

from deploy.errors import ParityError
from deploy.graphs.convert import RAW, expose_raw, to_onnx

from .test_spec import _spec


def test_raw_predictions_are_inner_values_until_exposed(exported):
    model = onnx.load(exported("GeneralizedRCNN").path)
    assert [v.name for v in model.graph.output] == ["num_dets", "boxes", "scores", "labels"]
    exposed = expose_raw(model)
    raw = [v.name for v in exposed.graph.output][4:]
    assert raw == [
        *(f"{RAW}features.p{i}" for i in range(2, 7)),
        *(f"{RAW}objectness.p{i}" for i in range(2, 7)),
        *(f"{RAW}rpn_deltas.p{i}" for i in range(2, 7)),
        f"{RAW}rois",
        f"{RAW}class_logits",
        f"{RAW}box_deltas",
    ]
    assert exposed.graph.node == model.graph.node and len(model.graph.output) == 4


def test_nothing_describes_the_source(exported):
    graph = onnx.load(exported("RetinaNet").path).graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        assert not part.doc_string and not part.metadata_props, part.name


def test_an_operator_without_translation_is_named(toy_detector, monkeypatch):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    monkeypatch.setattr(toy_detector.student.backbone.bottom_up.stages[0], "activation", Odd())
    with pytest.raises(ParityError, match="cannot convert this RetinaNet") as caught:
        to_onnx(toy_detector, _spec(dynamic="none", input_dtype="float32"))
    assert "\n" not in str(caught.value)
