"""Static NMS and all-level RoIAlign equal the eager kernels, which are torchvision's."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.export import Dim

import deploy.graphs.tensorrt.static_ops
from deploy.graphs.convert import expose_raw
from deploy.graphs.ops import INVALID, pyramid_roi_align, select_nms
from deploy.graphs.tensorrt.nms_rounds import ROUNDS, ROWS, Rounds
from deploy.graphs.tensorrt.static_ops import STATIC_TRANSLATIONS
from deploy.trt_lint import lint

N, K, GROUPS, IOU = 40, 30, 3, 0.4  # 0.4 is no float32


class Nms(torch.nn.Module):
    def forward(self, boxes, scores, groups):
        return select_nms(boxes, scores, groups.to(torch.int64), IOU, GROUPS, K)


class Align(torch.nn.Module):
    def forward(self, fine, coarse, rois, level):
        features, scales = [fine, coarse], [0.25, 0.125]
        return (
            pyramid_roi_align(features, rois, level.long(), scales, 5, 0, True),
            pyramid_roi_align(features, rois, level.long(), scales, 5, 2, False),
        )


def convert(module, arguments):
    batch = Dim("batch", min=1)
    program = torch.onnx.export(
        module.eval(),
        arguments,
        dynamo=True,
        opset_version=18,
        dynamic_shapes=[{0: batch}] * len(arguments),
        custom_translation_table=STATIC_TRANSLATIONS,
        verbose=False,
    )
    return program.model_proto


def session_of(model):
    """Arrays -> ({output name: array}, {raw name: array})."""
    session = ort.InferenceSession(expose_raw(model).SerializeToString())
    inputs = [value.name for value in session.get_inputs()]
    names = [value.name for value in session.get_outputs()]

    def run(arrays):
        values = session.run(names, dict(zip(inputs, map(np.asarray, arrays), strict=True)))
        results = dict(zip(names, values))
        raw = {name: results.pop(name) for name in names if name.startswith("raw.")}
        return list(results.values()), raw

    return run


@pytest.fixture(scope="module")
def nms_model():
    return convert(Nms(), random_boxes(2))


@pytest.fixture(scope="module")
def nms(nms_model):
    return session_of(nms_model)


def random_boxes(batch, seed=0, rows=N):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(batch, rows, 2, generator=generator) * 12
    sides = 5 + 20 * torch.rand(batch, rows, 2, generator=generator)
    return (
        torch.cat([corners, corners + sides], -1),
        torch.rand(batch, rows, generator=generator),
        torch.randint(0, GROUPS, (batch, rows), generator=generator, dtype=torch.int32),
    )


def clustered(batch, seed):
    """Five places, each with boxes that differ by less than a pixel."""
    boxes, scores, groups = random_boxes(batch, seed)
    return boxes[:, :5].repeat(1, 8, 1) + 0.1 * boxes.flip(1) % 1, scores, groups


def tied(batch, seed):
    """Only four different scores, and every box twice."""
    boxes, scores, groups = random_boxes(batch, seed)
    return boxes[:, :20].repeat(1, 2, 1), (scores * 4).ceil() / 4, groups % 2


def touching(batch, seed):
    """Integer coordinates: IoU of exactly the threshold, boxes of no area."""
    boxes, scores, groups = random_boxes(batch, seed)
    boxes = boxes.round()
    boxes[:, :8] = torch.tensor([0.0, 0, 10, 7]) + torch.arange(8)[:, None] * torch.tensor(
        [0.0, 3, 0, 3]  # neighbours share 40 of 100
    )
    boxes[:, 8:12, 2:] = boxes[:, 8:12, :2]
    return boxes, scores, groups * 0


def chain(length, batch=1):
    """Each box overlaps the next one only, in descending order of score."""
    boxes, scores = torch.zeros(batch, N, 4), torch.full((batch, N), INVALID)
    left = 4.0 * torch.arange(length)
    boxes[:, :length] = torch.stack([left, 0 * left, left + 10, 0 * left + 10], -1)
    scores[:, :length] = torch.linspace(0.9, 0.1, length)
    return boxes, scores, torch.zeros(batch, N, dtype=torch.int32)


@pytest.mark.parametrize("kind", [random_boxes, clustered, tied, touching])
@pytest.mark.parametrize("batch", [1, 3])
def test_static_nms_equals_torchvision(nms, kind, batch):
    rounds, kept, dropped = Rounds(), 0, 0
    for seed in range(10):
        arguments = kind(batch, seed)
        expected = Nms()(*arguments)
        (index,), raw = nms(arguments)
        np.testing.assert_array_equal(index, expected)
        rounds.add(raw, np.full((batch, 1), K), K)
        kept, dropped = kept + (index >= 0).sum(), dropped + (index < 0).sum()
    assert kept > 50 and dropped > 50, "vacuous: NMS must keep some and drop some"
    assert 1 <= rounds.needed < ROUNDS and not rounds.warnings()


def test_invalid_and_nan_rows_are_never_selected(nms):
    boxes, scores, groups = random_boxes(2)
    scores[0], scores[1, ::2] = float("nan"), INVALID
    (index,), _ = nms((boxes, scores, groups))
    np.testing.assert_array_equal(index, Nms()(boxes, scores, groups))
    assert (index[0] == -1).all() and (index[1] >= 0).any()


@pytest.mark.parametrize("length", [2, 5, ROUNDS])
def test_a_chain_of_suppressions_settles_in_as_many_rounds(nms, length):
    arguments, rounds = chain(length), Rounds()
    (index,), raw = nms(arguments)
    np.testing.assert_array_equal(index, Nms()(*arguments))
    assert index[0].tolist()[: length // 2] == [*range(0, length - 1, 2)]
    rounds.add(raw, np.array([[length // 2]]), K)
    assert (rounds.needed, rounds.unsettled) == (length - 1, 0)


def test_a_longer_chain_is_reported(nms):
    """Two of three images settle."""
    parts = [chain(4), chain(ROUNDS + 5), chain(0)]
    arguments, rounds = [torch.cat(tensors) for tensors in zip(*parts)], Rounds()
    (index,), raw = nms(arguments)
    assert not np.array_equal(index, Nms()(*arguments)), "or the warning would be for nothing"
    rounds.add(raw, np.zeros((3, 1)), K)
    assert (rounds.needed, rounds.unsettled, rounds.cut) == (ROUNDS, 1, 0)
    assert rounds.warnings()[0].startswith("NOT CONVERGED: 12 rounds")


def test_of_too_many_boxes_the_best_enter(monkeypatch):
    monkeypatch.setattr(deploy.graphs.tensorrt.static_ops, "ROWS", 20)
    run = session_of(convert(Nms(), random_boxes(2)))
    boxes, scores, groups = random_boxes(2, seed=5)
    (index,), raw = run((boxes, scores, groups))
    best = scores >= scores.topk(20)[0][:, -1:]
    expected = Nms()(boxes, torch.where(best, scores, INVALID), groups)
    np.testing.assert_array_equal(index, expected)
    assert {value.shape for value in raw.values()} == {(2, 20, 2)}


def test_a_full_matrix_is_reported_only_where_detections_are_missing():
    raw = {f"raw.nms.x.round{i:02d}": np.ones((3, ROWS, 2), np.float32) for i in range(3)}
    raw["raw.nms.x.round00"][2, -1] = 0  # a candidate less
    rounds = Rounds()
    rounds.add(raw, np.array([[100], [99], [99]]), 100)
    assert (rounds.cut, rounds.unsettled) == (1, 0)
    assert rounds.warnings() == ["2048 or more candidates entered NMS in 1 images"]


def align_inputs(batch):
    boxes, _, _ = random_boxes(batch, seed=3, rows=6)
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(batch, 4, 16, 16, generator=generator),
        torch.rand(batch, 4, 8, 8, generator=generator),
        torch.cat([boxes, torch.zeros(batch, 1, 4)], 1),  # an empty one as well
        torch.randint(0, 2, (batch, 7), generator=generator, dtype=torch.int32),
    )


def test_roi_align_on_all_levels_equals_that_on_one():
    model = convert(Align(), align_inputs(2))
    run = session_of(model)
    for batch in (1, 2, 3):
        arguments = align_inputs(batch)
        for actual, expected in zip(run(arguments)[0], Align()(*arguments), strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-5)
            assert np.ptp(expected.numpy()) > 0.5
    assert sum(node.op_type == "RoiAlign" for node in model.graph.node) == 4
    assert lint(model) == []


def test_nms_has_no_size_that_depends_on_data(nms_model):
    assert lint(nms_model) == []
    assert not any("Non" in node.op_type for node in nms_model.graph.node)
    onnx.checker.check_model(nms_model, full_check=True)


class Divide(torch.nn.Module):
    def forward(self, number):
        return number // 32


def test_numbers_are_divided_without_remainders():
    """18542495 is one of those of which TensorRT 10.7 finds a wrong remainder."""
    numbers = torch.tensor([[0, 31, 32, 18542495], [1, 33, 2**31 - 1, 2**40]])
    model = convert(Divide(), (numbers,))
    np.testing.assert_array_equal(session_of(model)([numbers])[0][0], numbers // 32)
    assert [node.op_type for node in model.graph.node] == ["Div"]
