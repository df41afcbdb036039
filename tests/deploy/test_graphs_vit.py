"""Students over vision transformers: one canvas, on which the graph is the model."""

import json

import onnx
import pytest
import torch

from deploy.errors import UserError
from deploy.export import main
from deploy.graphs import exportable
from tests.fgd.distillation.lazy_teachers import SquareBackbone
from tests.tiny_vit import SQUARE, over_vit

from .conftest import (
    ARCHITECTURES,
    assert_equal_detections,
    conditioned,
    detectron2_outputs,
    make_cfg,
    ort_outputs,
    save_checkpoint,
    scenes,
    toy_cfg,
)

SIZES = [(96, 128), (128, 70), (50, 33)]


def ragged():
    """Images of `SIZES` on one canvas, with noise beside them."""
    images = torch.randint(0, 256, (3, 3, SQUARE, SQUARE)).float()
    for canvas, scene, (height, width) in zip(images, scenes(3, (SQUARE, SQUARE)), SIZES):
        canvas[:, :height, :width] = scene[:, :height, :width]
    return images


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_module_is_the_model_on_ragged_images(arch):
    model, images = conditioned(over_vit(make_cfg(arch))).eval(), ragged()
    with torch.no_grad():
        outputs = exportable(model)(images, torch.tensor(SIZES, dtype=torch.int32))[:4]
    assert_equal_detections(outputs, detectron2_outputs(model, images, SIZES))


def test_the_exported_graph_is_the_model(export_tiny):
    cfg = over_vit(toy_cfg("RetinaNet"))  # the cheapest; `make quick` exports an R-CNN
    cfg.MODEL.TIMM.TOP_BLOCK = "none"
    made = export_tiny(cfg)
    assert (made.spec.height, made.spec.width, made.spec.size_divisibility) == (SQUARE,) * 3
    images, model = ragged(), made.model.eval()
    outputs = ort_outputs(made.path, images, SIZES)
    assert_equal_detections(outputs, detectron2_outputs(model, images, SIZES))
    report = json.loads((made.folder / "report.json").read_text())
    assert report["verification"]["passed"] and report["verification"]["tally"]["expected"] > 50
    for name, errors in report["verification"]["raw_errors"].items():
        assert errors["graph"] < 1e-5 * max(errors["scale"], 1), name
    names = {x.name for x in onnx.load(made.path).graph.initializer}
    assert "student.backbone.bottom_up.body.model.pos_embed" in names
    assert report["values"]["unused"] == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    cfg = over_vit(make_cfg("RetinaNet"))
    path = tmp_path_factory.mktemp("vit") / "student.pth"
    return save_checkpoint(conditioned(cfg), cfg, path), cfg


@pytest.mark.parametrize(
    "options, said",
    [
        (["--dynamic", "image"], "--dynamic image: {}; give --dynamic batch or none"),
        (["--size", "256", "256"], "--size 256 256: {}; leave --size out"),
        (["--filled"], "--filled: {}, and nothing is masked in it anyway; leave it out"),
        (["INPUT.MAX_SIZE_TEST"], "INPUT.MAX_SIZE_TEST 160: {}; give a config of 128 or less with"),
    ],
    ids=str,
)
def test_other_canvases_are_refused_in_one_line(options, said, checkpoint, tmp_path, capfd):
    path, cfg = checkpoint
    if options == ["INPUT.MAX_SIZE_TEST"]:
        cfg = cfg.clone()
        cfg.INPUT.MAX_SIZE_TEST = 160
        (tmp_path / "other.yaml").write_text(cfg.dump())
        options = ["--config-file", str(tmp_path / "other.yaml")]
    assert main([str(path), "--output", str(tmp_path / "out"), *options]) == 2
    only = f"this student takes one canvas, {SQUARE}x{SQUARE} pixels (MODEL.VIT.SQUARE)"
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said.format(only) in lines[0] and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_square_that_detectron2_alone_knows_is_refused():
    """ViTDet's own class on main: its size_divisibility is not its square."""
    model = conditioned(make_cfg("GeneralizedRCNN"))
    model.backbone = SquareBackbone()
    with pytest.raises(UserError) as caught:
        exportable(model)
    assert str(caught.value).startswith(
        "MODEL.BACKBONE.NAME: SquareBackbone pads images to a square of 128 pixels and states a "
        "size_divisibility of 0, so a graph of it would find others; only build_vit_fpn_backbone"
    )
