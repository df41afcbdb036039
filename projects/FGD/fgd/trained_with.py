"""Whether weights are used with the config that they were trained with."""

from typing import Dict, Optional

from detectron2.config import CfgNode

from fgd_inputs.json_file import shown

from .config import get_fgd_cfg, student_config
from .errors import UserError
from .yaml_config import leaves, parse_yaml

# With others than it was trained with, a network is given images that it has never seen the like.
_MUST_AGREE = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
# What detections depend on. A prefix that ends in "." stands for all keys under it.
_SAID = (
    *_MUST_AGREE,
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "TEST.DETECTIONS_PER_IMAGE",
    "TEST.AUG.",
    "MODEL.",
)
_WITHOUT_EFFECT = ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.TIMM.PRETRAINED")


def other_config(path: str, trained: Optional[str], cfg: CfgNode) -> str:
    """One line on how a config differs from that of the training; "" if nothing needs to be said.

    Args:
        path: of the weights.  trained: yaml of the student's config in that file, None = unknown.
        cfg: what the weights are to be used with.
    Raises:
        UserError: in channel order or normalisation.
    """
    if not trained:
        return ""
    before, now = _parse(trained, path), _parse(student_config(cfg).dump(), "config")
    defaults = _parse(get_fgd_cfg().dump(), "config")  # a key that is new acted as its default
    changes = {}
    for key in sorted(filter(_is_said, now)):
        old = before.get(key, defaults.get(key))
        if old != now[key]:
            changes[key] = f"{key} {shown(now[key])} (trained with {shown(old)})"
    wrong = [text for key, text in changes.items() if key in _MUST_AGREE]
    if wrong:
        raise UserError(
            f"{path} was trained with other images than this config makes: {', '.join(wrong)}. "
            "Use the values of the training"
        )
    if not changes:
        return ""
    return f"{path} is used with another config than it was trained with: " + ", ".join(
        changes.values()
    )


def _is_said(key: str) -> bool:
    return key not in _WITHOUT_EFFECT and any(
        key == name or (name.endswith(".") and key.startswith(name)) for name in _SAID
    )


def _parse(text: str, source: str) -> Dict[str, object]:
    return dict(leaves(parse_yaml(text, source)))
