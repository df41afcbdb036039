"""A network of timm, a vision transformer above all, as a teacher that is no detector.

It has one map, its patch tokens or its last features, and no heads and no classes. Its weights are
a file of its own state dict, or timm's own pretrained ones.
"""

from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from timm import create_model
from timm.models import is_model_pretrained
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import get_fgd_cfg, student_config
from ..detectors.backbones import check_timm_name
from ..detectors.pretrained import timm_normalisation
from ..errors import UserError, in_one_line
from ..weights import LoadReport, load_complete

KEY = "MODEL.DISTILLER.TEACHER.TIMM"
TOKENS = "tokens"  # the name of its map
_PROBE = (4, 6)  # cells; some networks divide the map into windows


def check_timm_teacher(distiller: CfgNode) -> None:
    """Raise UserError for keys of MODEL.DISTILLER that do not go with TEACHER.TIMM."""
    node = distiller.TEACHER
    if node.CONFIG_FILE:
        raise UserError(
            f"{KEY} {node.TIMM!r} and TEACHER.CONFIG_FILE {node.CONFIG_FILE!r} are two teachers; "
            "leave one of them empty"
        )
    if distiller.INHERIT:
        raise UserError(
            f"MODEL.DISTILLER.INHERIT: the teacher {node.TIMM} ({KEY}) has no neck and no head to "
            "inherit; set it False"
        )
    check_timm_name(KEY, node.TIMM)
    if node.TIMM_STRIDE < 0:
        raise UserError(f"{KEY}_STRIDE: {node.TIMM_STRIDE} is not a number of pixels, or 0")
    if not node.WEIGHTS and not is_model_pretrained(node.TIMM):
        raise UserError(
            f"{KEY} {node.TIMM!r}: timm has no pretrained weights of that name; set "
            "MODEL.DISTILLER.TEACHER.WEIGHTS"
        )


def build_timm_teacher(cfg: CfgNode) -> Tuple["TimmNetwork", CfgNode]:
    """The network of MODEL.DISTILLER.TEACHER.TIMM with random weights, on the student's device.

    Returns:
        Also a config that says of it what a detector's own says: its name as the architecture,
        channel order, mean and deviation, which are those of the name's tag.
    """
    node = cfg.MODEL.DISTILLER.TEACHER
    config = student_config(get_fgd_cfg())
    config.MODEL.META_ARCHITECTURE, config.MODEL.DEVICE = node.TIMM, cfg.MODEL.DEVICE
    config.INPUT.FORMAT = "RGB"
    mean, std = timm_normalisation(KEY, node.TIMM)
    config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD = mean, std
    model = TimmNetwork(node.TIMM, mean, std, node.TIMM_STRIDE)
    return model.to(cfg.MODEL.DEVICE), config


class TimmNetwork(nn.Module):
    """What a `FrozenTeacher` is made of: ``backbone``, ``pixel_mean`` and ``pixel_std``.

    ``network`` is timm's, without its classifier, whose modules ``classifier`` names.

    Args:
        name: in timm, with or without a tag. mean, std: of each channel, 0..255.
        stride: see `TokenMap`.
    Raises:
        UserError: timm cannot build it, or see `TokenMap`.
    """

    def __init__(self, name: str, mean: Sequence[float], std: Sequence[float], stride: int = 0):
        super().__init__()
        self.name = name
        self.backbone = TokenMap(_create(name), stride)
        for key, values in (("pixel_mean", mean), ("pixel_std", std)):
            self.register_buffer(key, torch.tensor(values).view(-1, 1, 1), False)
        names = self.network.pretrained_cfg.get("classifier") or ()
        self.classifier = [names] if isinstance(names, str) else list(names)

    @property
    def network(self) -> nn.Module:
        return self.backbone.network

    def load_weights(self, path: str, *, allow_partial: bool = False) -> LoadReport:
        """A file of the network's state dict, whose classifier is left out; "" = timm's own.

        Raises:
            UserError: as `load_complete`, also for other names that the network lacks; or timm's
                weights cannot be had.
        """
        if path:
            options = {"allow_partial": allow_partial, "left_out": self.classifier}
            return load_complete(self.network, path, **options)
        state = _create(self.name, pretrained=True).state_dict()
        self.network.load_state_dict(state)
        return LoadReport(loaded=len(state))

    def preprocess_image(self, batched_inputs: List[dict]) -> ImageList:
        """As a detector's: normalised images, in RGB, padded to one size."""
        mean, std = self.pixel_mean, self.pixel_std
        images = [(x["image"].to(mean.device) - mean) / std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)


class TokenMap(Backbone):
    """images (N, 3, H, W), normalised → {"tokens": (N, D, h, w)}, h = ceil(H / stride).

    A map that covers exactly the images, as the student's do, whatever their size: where H and W
    are no multiples of the stride, or the stride is not the network's own, the images are resized
    bilinearly to h x w cells of the network's own. Padding them instead would make the map cover
    more than the student's. Class and register tokens are dropped.

    Args:
        network: of timm, without its classifier.
        stride: pixels of the images that a cell stands for; 0 = the network's own, a patch. Twice
            that shows the network the images at half their size, each pixel the mean of 2x2.
    Raises:
        UserError: the network does not give such a map at any size.
    """

    def __init__(self, network: nn.Module, stride: int = 0):
        super().__init__()
        self.network = network
        try:
            self.patch = int(network.feature_info[-1]["reduction"])
        except (AttributeError, TypeError, KeyError, IndexError):
            raise UserError(f"{KEY}: timm does not say the stride of this network") from None
        self.stride = stride or self.patch
        self._channels_last = False
        self.channels = self._probe()

    @torch.no_grad()
    def _probe(self) -> int:
        """The map's channels, from a forward on a small oblong image."""
        training = self.network.training
        images = torch.zeros(1, 3, *(cells * self.patch for cells in _PROBE))
        try:
            features = self.network.eval().forward_features(images)
            # Networks of either order of dimensions exist, and few say which.
            self._channels_last = features.dim() == 4 and tuple(features.shape[1:3]) == _PROBE
            return self._as_map(features, _PROBE).shape[1]
        except Exception as error:  # an assertion about the size, or shapes that do not fit
            raise UserError(
                f"{KEY}: this network has no map of {_PROBE[0]}x{_PROBE[1]} cells for images of "
                f"{images.shape[2]}x{images.shape[3]} pixels ({in_one_line(error)}), so it cannot "
                "teach on images of any size; use a vision transformer (vit_*, eva02_*) or a "
                "convolutional network"
            ) from error
        finally:
            self.network.train(training)

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return {TOKENS: ShapeSpec(channels=self.channels, stride=self.stride)}

    def forward(self, images: Tensor) -> Dict[str, Tensor]:
        grid = tuple(-(-size // self.stride) for size in images.shape[-2:])
        size = tuple(cells * self.patch for cells in grid)
        if size != tuple(images.shape[-2:]):
            # At half size every pixel counts without a filter; further down it needs one.
            antialias = self.stride > 2 * self.patch
            images = F.interpolate(images, size, mode="bilinear", antialias=antialias)
        return {TOKENS: self._as_map(self.network.forward_features(images), grid)}

    def _as_map(self, features: Tensor, grid: Tuple[int, int]) -> Tensor:
        if features.dim() == 3:  # (N, prefix + h w, D)
            tokens = features[:, getattr(self.network, "num_prefix_tokens", 0) :]
            return tokens.transpose(1, 2).unflatten(2, grid)
        features = features.permute(0, 3, 1, 2) if self._channels_last else features
        if features.dim() != 4 or tuple(features.shape[2:]) != tuple(grid):
            raise ValueError(f"features of shape {tuple(features.shape)}")
        return features


def _create(name: str, pretrained: bool = False) -> nn.Module:
    """timm.create_model without the classifier, for any input size where the network has that.

    Raises:
        UserError: in one line, whatever timm and its hub client raise.
    """
    check_timm_name(KEY, name)
    for options in ({"dynamic_img_size": True}, {}):
        try:
            return create_model(name, pretrained=pretrained, num_classes=0, **options)
        except Exception as error:  # timm and its hub client raise about ten unrelated types here
            if "dynamic_img_size" in str(error) and options:
                continue  # networks without an embedding of positions have no such option
            if pretrained:
                raise UserError(
                    f"{KEY}: pretrained weights of {name!r} could not be loaded "
                    f"({in_one_line(error)}). Without network set MODEL.DISTILLER.TEACHER.WEIGHTS "
                    "to a file of them, or fill timm's cache (HF_HOME) first"
                ) from error
            raise UserError(f"{KEY} {name!r}: {in_one_line(error)}") from error
