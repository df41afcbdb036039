import pytest
import torch
from detectron2.layers import CycleBatchNormList

from deploy.errors import UserError
from deploy.graphs import exportable
from deploy.graphs.retinanet import LevelBatchNorm

from .conftest import (
    CANVAS,
    SIZES,
    assert_equal_detections,
    conditioned,
    detectron2_outputs,
    ort_outputs,
    scenes,
    toy_cfg,
)


@pytest.mark.parametrize("norm", ["", "BN"])
def test_module_equals_detectron2_on_a_ragged_batch(norm):
    cfg = toy_cfg("RetinaNet")
    cfg.MODEL.RETINANET.NORM = norm
    model, images = conditioned(cfg), scenes(3, seed=2)
    outputs = exportable(model)(images, torch.tensor(SIZES, dtype=torch.int32))
    assert_equal_detections(outputs[:4], detectron2_outputs(model, images, SIZES))


def test_small_topk_and_few_detections_are_detectron2s():
    """Fewer candidates than the levels have, and fewer places than NMS leaves over."""
    cfg = toy_cfg("RetinaNet")
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 30, 7
    model, images = conditioned(cfg), scenes(2, seed=3)
    outputs = exportable(model)(images, torch.tensor([CANVAS] * 2, dtype=torch.int32))
    assert outputs[1].shape == (2, 7, 4)
    assert_equal_detections(outputs[:4], detectron2_outputs(model, images, [CANVAS] * 2))


def test_cut_scores_are_where_equal_candidates_are_cut():
    """Saturated logits are one score; a level with as many candidates as it keeps cuts nothing."""
    cfg = toy_cfg("RetinaNet")
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 3
    detector = exportable(conditioned(cfg))
    raw = {
        f"logits.{level}": torch.zeros(2, detector.num_classes, 1, 1) for level in detector.levels
    }
    tied, apart = torch.tensor([40.0, 30, 20, 19]), torch.tensor([40.0, 3, 2, 1])
    raw[f"logits.{detector.levels[0]}"] = torch.stack([tied, apart])[:, None, None].expand(
        2, detector.num_classes, 1, 4
    )
    cuts = detector.cut_scores(raw, torch.tensor([CANVAS] * 2))
    assert cuts[0] == [1.0]
    # the fourth best of (40, 40, ..., 3, ...) is 40 or 3, by the number of classes
    assert cuts[1] == ([1.0] if detector.num_classes > 3 else [])


def test_level_batch_norm_is_the_cycle_in_eval_mode():
    cycle = CycleBatchNormList(length=2, num_features=4).eval()
    for norm in cycle:
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    cycle.weight.data.normal_(), cycle.bias.data.normal_()
    x = torch.randn(2, 4, 3, 3)
    expected, norm = [cycle(x), cycle(x)], LevelBatchNorm(cycle)
    for level in (0, 1, 0):
        torch.testing.assert_close(norm(x), expected[level])
    assert not torch.allclose(*expected)


def test_other_heads_are_refused():
    model = conditioned(toy_cfg("RetinaNet"))
    model.head = torch.nn.Identity()
    with pytest.raises(UserError, match="the RetinaNet head: Identity"):
        exportable(model)


def test_onnx_dynamic_image_uint8_with_batch_norm_per_level(dynamic_retinanet):
    """Canvases of several sizes, down to one cell on the coarsest level; top-k is computed."""
    made = dynamic_retinanet
    for shape in ((96, 128), (64, 224), (32, 32)):
        images = scenes(2, shape, seed=5)
        sizes = [shape, (shape[0] - 5, shape[1] - 7)]
        expected = detectron2_outputs(made.model, images, sizes)
        assert_equal_detections(ort_outputs(made.path, images, sizes), expected, at_least=2)
