"""Stands in for Detectron2's compiled extension in this pure-Python build.

RetinaNet, R-CNN and FCOS never call it: NMS, RoIAlign and deformable convolution come from
torchvision. An operation that does need it (rotated boxes, Detectron2's own deformable
convolution, fast COCO evaluation) fails when it is used, with its name.
"""


def get_compiler_version() -> str:
    return "none (pure-Python build)"


def get_cuda_version() -> str:
    return "none (pure-Python build)"


def has_cuda() -> bool:
    return False


def __getattr__(name):
    raise AttributeError(
        f"detectron2._C.{name} is a compiled operation and this Detectron2 is a pure-Python build "
        "of v0.6. Install Detectron2 from its own repository to use it."
    )
