"""The options of `deploy/export.py`."""

import argparse

from deploy.reduced.precision import PRECISIONS
from deploy.reduced.quantize import RECIPES
from deploy.serving.engine import add_engines

_EXAMPLES = """examples:
  python deploy/export.py output/model_final.pth
  python deploy/export.py model_final.pth --size 480 640 --dynamic none --images photos/
  python deploy/export.py model_final.pth --precision int8 --calibration photos/ --dataset test.json
  python deploy/export.py model_final.pth --target tensorrt --size 800 1344

Writes CHECKPOINT_onnx/ beside the checkpoint: model.onnx, model.json (its spec), report.json.
Exit codes: 0 verified; 2 something about the command, config or checkpoint; 4 the graph could not
be shown to equal the model (it is then kept as model.failed.onnx, for inspection only).
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Distillation checkpoint -> verified ONNX file of the student alone.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="checkpoint of train_net.py, or of stock Detectron2")
    parser.add_argument("--output", metavar="DIR", help="default: CHECKPOINT_onnx/ beside it")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="student's config; default: the one in the checkpoint, else config.yaml beside it",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="canvas in pixels; default: INPUT.MIN_SIZE_TEST x MAX_SIZE_TEST, rounded up",
    )
    parser.add_argument(
        "--filled",
        action="store_true",
        help="every image will fill the canvas, up to the backbone's stride, as one camera's do, "
        "and others are refused: some 7 %% faster",
    )
    parser.add_argument(
        "--dynamic",
        choices=("none", "batch", "image"),
        default="batch",
        help="what may vary: nothing (batch 1), the batch (default), or batch and canvas",
    )
    parser.add_argument("--score-threshold", type=float, metavar="T", help="default: the config's")
    parser.add_argument(
        "--proposals",
        type=int,
        metavar="N",
        help="R-CNN: boxes that reach the second stage, at most; fewer are faster and can cost AP "
        "(default: the config's MODEL.RPN.POST_NMS_TOPK_TEST)",
    )
    parser.add_argument("--input-dtype", choices=("float32", "uint8"), default="float32")
    parser.add_argument(
        "--target",
        choices=("onnx", "tensorrt"),
        default="onnx",
        help="tensorrt: static NMS, constant sizes, lint, and the commands that build an engine",
    )
    parser.add_argument("--images", metavar="DIR", help="verify on these images too")
    add_engines(parser)
    _add_precision_options(parser)
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _add_precision_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision")
    group.add_argument(
        "--precision",
        action="append",
        choices=PRECISIONS,
        default=[],
        help="write model.fp16.onnx or model.int8.onnx too; may be given twice",
    )
    group.add_argument(
        "--recipe",
        choices=list(RECIPES),
        help="int8 for ONNX Runtime on CPUs (u8 activations) or TensorRT (s8, symmetric); "
        "default: that of --target",
    )
    group.add_argument(
        "--calibration", metavar="DIR", help="images for the ranges of int8; not those of --dataset"
    )
    group.add_argument("--dataset", help="COCO-format JSON or registered name, to measure AP on")
    group.add_argument("--images-root", metavar="DIR", help="of the JSON's images")
    group.add_argument(
        "--max-ap-drop",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="AP that int8 may lose to float32, of 100 (%(default)s); float16 at most 0.2",
    )
