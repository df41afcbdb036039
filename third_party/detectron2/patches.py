"""What v0.6 needs in order to import and run with current libraries, and nothing more.

Each patch is (file, text expected exactly once, replacement); a text that is not there exactly
once fails the build. Behaviour that the project wants on every Detectron2 lives in the project.
"""

import re
from pathlib import Path

PATCHES = [
    # Pillow 10 removed Image.LINEAR, an alias of BILINEAR.
    ("data/transforms/transform.py", "interp=Image.LINEAR", "interp=Image.BILINEAR"),
    # caffe2 left PyTorch; upstream main made it optional in the same way.
    (
        "export/__init__.py",
        "from .api import *\n",
        "try:\n    from caffe2.proto import caffe2_pb2 as _unused\nexcept ImportError:\n    pass\n"
        "else:\n    from .api import *\n",
    ),
    # setuptools 81 removed pkg_resources.
    ("model_zoo/model_zoo.py", "import pkg_resources\n", "from importlib import resources\n"),
    (
        "model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'str(resources.files("detectron2.model_zoo").joinpath("configs", config_path))',
    ),
    # Fast COCO evaluation needs the compiled extension; without it fall back to pycocotools, as
    # upstream main does.
    (
        "evaluation/fast_eval_api.py",
        "from detectron2 import _C\n",
        "from detectron2 import _C\nfrom detectron2._C import COCOevalEvaluateImages  # noqa\n",
    ),
    (
        "evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "try:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n    COCOeval_opt = COCOeval\n",
    ),
]

# NumPy 1.24 removed the aliases of Python's own types: file -> number of uses.
NUMPY_ALIAS = re.compile(r"\bnp\.(bool|int|float|str|object)\b")
NUMPY_ALIAS_USES = {
    "data/build.py": 2,
    "data/datasets/pascal_voc.py": 1,
    "evaluation/pascal_voc_evaluation.py": 2,
    "evaluation/sem_seg_evaluation.py": 7,
    "structures/masks.py": 3,
    "utils/video_visualizer.py": 1,
    "utils/visualizer.py": 3,
}


def apply_patches(package: Path) -> None:
    """Patch the unpacked ``detectron2`` folder in place.

    Raises:
        RuntimeError: a text to patch is not there as often as expected.
    """
    for name, expected, replacement in PATCHES:
        text = (package / name).read_text()
        if text.count(expected) != 1:
            raise RuntimeError(f"{name}: expected once, found {text.count(expected)}: {expected!r}")
        (package / name).write_text(text.replace(expected, replacement))
    for name, expected in NUMPY_ALIAS_USES.items():
        text, uses = NUMPY_ALIAS.subn(r"\1", (package / name).read_text())
        if uses != expected:
            raise RuntimeError(f"{name}: expected {expected} removed numpy aliases, found {uses}")
        (package / name).write_text(text)
