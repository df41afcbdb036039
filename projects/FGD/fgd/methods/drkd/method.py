"""Dual Relation Knowledge Distillation (DRKD, IJCAI 2023, arXiv 2302.05637).

Published, COCO box AP of the student without and with it: Faster R-CNN R-50 38.4 → 41.6, RetinaNet
R-50 37.4 → 40.3, with teachers of the X-101 family.

N images, k levels, C channels, P = H·W cells, R_n boxes of image n. t and s are a level's maps of
teacher and student, f a trained 1x1 convolution from the student's channels to the teacher's, r
the RoIAlign features (R, 9C) of the ground-truth boxes, 3x3 cells each. G is `GraphReasoning`, ψ
is `relation_matrix`; both exist once for each network and level, and both are trained. Gradients
flow into the student's maps and all of these modules.

FORM "paper", summed over levels, the instance terms over the two finest ones:

    pixel_relation     1/(k N) ‖f(G_s(s)) − G_t(t)‖²
    instance_relation  1/N Σ_n Σ_ij (f(ψ_ij(s)) − ψ_ij(t))²         f here: a·ψ + b, at first ψ
    instance_feature   1/N Σ_n 1/R_n Σ_i ‖f(r_i(s)) − r_i(t)‖²

FORM "code", what the authors released, which is another loss (‖·‖ of all elements, not squared):

    pixel_relation     ‖f(G_s(s)) − G_t(t)‖
    instance_relation  Σ_n ‖f(z(s)) − z(t)‖,   z = r + W ψ g(r), W and g linear
    instance_feature   Σ_n ‖f(r(s)) − r(t)‖

Where the sources are silent or differ:

- The paper writes its equations for one image; we average over images.
- The paper's weights were not found; the defaults are ours, see `DRKD.add_config`.
- The paper's relation filter is not described, and the released one is a random layer that is made
  anew at each use. FILTER "trained" is our reconstruction, see `RegionRelation`.
- ψ's softmax runs over rows, as in the code; one reading of the paper says columns.
- The code's G sums over cells and grows with the map. Form "paper" divides by their number, which
  the paper does not write.
- The code cuts the regions of every image from the first image of the batch, an error. Ours come
  from each image's own map in both forms; with one image nothing differs.
- The code stops at an image without boxes. Here it adds 0 to the instance terms, with a zero
  gradient.
- The code places regions by the ratio of map widths, the form "paper" by the stride.

An image with one box has ψ = 1: no gradient reaches θ, φ and the filter. An unsquared norm of 0
has a gradient of 0. Both sides of the relations are trained, so relations that say nothing would
satisfy them; neither the paper nor the code has a term against that.

Costs: at 256 channels each `RegionRelation` of the published width has 5.6 million parameters
(10.9 in form "code"), and there are four; each `GraphReasoning` has 0.1 million with 64 nodes and
0.7 with 256. RELATION_WIDTH and NODES reduce them. From forward to backward 4.5 times the
student's maps are held where a graph has 64 nodes, 7 times at 256 nodes, which are the coarse
levels: of both networks the projection to nodes and the input of the norm, of the student the
input of f, and the difference. The gradients of the trained modules need them.
"""

from typing import List, Mapping, Sequence, Tuple

from detectron2.config import CfgNode
from torch import Tensor, nn

from ...errors import UserError
from ..batch import Batch, Level
from ..method import METHOD_REGISTRY, Method, Table
from ..parts import check_level_values, of_level, small_dtype
from .instance import Filter, InstanceTerms, random_filter, region_features
from .pixel import PixelRelation


@METHOD_REGISTRY.register()
class DRKD(Method):
    """The module's three terms; needs ground-truth boxes.

    Args:
        form: "paper" or "code". filtered: "trained", "random" or "none", see `RegionRelation`.
        nodes: of the graph of each level, finest first. norm: of `GraphReasoning`, "BN" or "GN".
        widths: of θ, φ, g (0 = published) and of the trained filter.
    """

    terms = ("pixel_relation", "instance_relation", "instance_feature")
    boxless = ("pixel_relation",)

    def __init__(
        self,
        levels: Sequence[Level],
        weights: Mapping[str, float],
        form: str = "paper",
        filtered: str = "trained",
        nodes: Sequence[int] = (64, 64, 256, 256, 256),
        norm: str = "BN",
        widths: Tuple[int, int] = (0, 64),
    ):
        super().__init__(sorted(levels, key=lambda level: level.stride), weights)
        self.form, self.filtered = form, filtered
        channels = {x.name: (x.student_channels, x.teacher_channels) for x in self.distilled}
        self.pixel = nn.ModuleDict(
            {
                name: PixelRelation(*pair, of_level(nodes, i), form, norm)
                for i, (name, pair) in enumerate(channels.items())
            }
        )
        self.instance = nn.ModuleDict(
            {
                name: InstanceTerms(*pair, form, filtered, *widths)
                for name, pair in list(channels.items())[:2]
            }
        )

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weights of the terms, no unit. The paper's were not found. These are ours, for form
        # "paper", RetinaNet and 1333x800: with maps of unit variance all terms are of order 1
        # before training. The pixel term is a sum over cells and needs a smaller weight for p2-p5.
        # Those of the released code, for form "code": 1e-3, 4e-3 and 2.4e-3 for two-stage
        # detectors; for one-stage ones it has the instance relation alone, 5e-3.
        node.PIXEL_RELATION_WEIGHT = 1e-6
        node.INSTANCE_RELATION_WEIGHT = 0.25
        node.INSTANCE_FEATURE_WEIGHT = 2e-4
        # "paper": the paper's equations; "code": what the authors released, see the module.
        node.FORM = "paper"
        # What weighs relations of regions: "trained", our reconstruction; "random", a new random
        # layer at each use, as the released two-stage code; "none", as its one-stage code.
        node.FILTER = "trained"
        # Width of the trained filter.
        node.FILTER_WIDTH = 64
        # Width of the relations of regions; 0 = half of 9 times the channels, as published.
        node.RELATION_WIDTH = 0
        # Nodes of the graph of each level, finest first; the last one for all coarser levels.
        node.NODES = [64, 64, 256, 256, 256]
        # Of the graph units: "BN", by the batch of this GPU alone; "GN" does not depend on it.
        node.NORM = "BN"

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        key = "MODEL.DISTILLER.DRKD"
        choices = {
            "FORM": ("paper", "code"),
            "FILTER": ("trained", "random", "none"),
            "NORM": ("BN", "GN"),
        }
        for name, allowed in choices.items():
            if node[name] not in allowed:
                raise UserError(f"{key}.{name}: {node[name]!r} is none of {', '.join(allowed)}")
        for name, least in {"FILTER_WIDTH": 1, "RELATION_WIDTH": 0}.items():
            if node[name] < least:
                raise UserError(f"{key}.{name}: {node[name]} is below {least}")
        check_level_values(f"{key}.NODES", node.NODES)

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "DRKD":
        node = cls.node(cfg)
        widths = node.RELATION_WIDTH, node.FILTER_WIDTH
        options = node.FORM, node.FILTER, node.NODES, node.NORM, widths
        return cls(levels, cls.weights_of(node), *options)

    def forward(self, batch: Batch) -> Table:
        """Level → weighted terms; the instance terms of the two finest levels only."""
        found: Table = {}
        scales = self._scales(batch)
        for i, name in enumerate(self.pixel):
            dtype = small_dtype(batch.student[name], batch.teacher[name])
            maps = batch.student[name].to(dtype), batch.teacher[name].to(dtype)
            pixel = self.pixel[name](*maps)
            values = {"pixel_relation": pixel / len(self.pixel) if self.form == "paper" else pixel}
            if name in self.instance:
                regions = [region_features(x, batch.boxes, scales[i]) for x in maps]
                filters = [
                    self._filters(batch, (i, side), x.flatten(1)) for side, x in enumerate(regions)
                ]
                counts = [len(x) for x in batch.boxes]
                values.update(self.instance[name](*regions, counts, filters))
            found[name] = self.weigh(values)
        return found

    def _scales(self, batch: Batch) -> List[float]:
        """Cells per pixel of each level.

        Form "code": the finest level's, times the ratio of the widths, which is not 1/stride where
        a width was rounded.
        """
        widths = [batch.student[level.name].shape[3] for level in self.distilled]
        strides = [
            level.stride or batch.padded_size[1] / width
            for level, width in zip(self.distilled, widths, strict=True)
        ]
        if self.form == "paper":
            return [1 / stride for stride in strides]
        return [width / (widths[0] * strides[0]) for width in widths]

    def _filters(self, batch: Batch, key: Tuple[int, int], regions: Tensor) -> List[Filter]:
        if self.filtered != "random":
            return []
        return [
            random_filter(
                len(boxes),
                regions.shape[1],
                batch.generator(regions.device, *key, image),
                regions.dtype,
            )
            for image, boxes in enumerate(batch.boxes)
        ]
