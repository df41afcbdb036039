"""NKD and its teacher-free form (Rethinking KD via Cross-Entropy, arXiv 2208.10139; ICCV 2023,
arXiv 2303.13005), on the RoI logits of a two-stage detector.

Published for classification only, ImageNet top-1 without and with it: ResNet-18 69.90 → 71.96
under ResNet-34, MobileNet 69.21 → 72.58 under ResNet-50; teacher-free ResNet-18 70.76. There is no
published use in a detector. What is ours here is which rows are distilled: the student's sampled
proposals, those of objects, or with weights of their own those of background. The K+1 columns of
the logits, background among them, are the classes of the paper.

Symbols: R rows of logits s (student) and t (teacher), (R, K+1); y the label of a row, 0..K, K for
background; means are over the rows used. Gradients flow into s alone. Without a row that is used
every term is exactly 0, and so is its gradient. The detector's own cross-entropy stays as it is.

Cost: softmaxes over (R, K+1). For NKD also the teacher's box head on the student's proposals.
"""

from typing import Dict, Mapping

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..errors import UserError
from .batch import Batch, Regions
from .method import METHOD_REGISTRY, Method, Table
from .parts import mean_over, small_dtype


def target_term(student: Tensor, teacher: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """L_t = -mean softmax(t)[y] log softmax(s)[y]: the teacher's confidence weighs the row.

    Without a temperature, as the paper. >= 0.

    Args:
        student, teacher: (R, K+1). labels: (R,), any value where a row is not used.
        rows: (R,) bool, which are used.
    """
    weight, log_prob = (of_label(x, labels) for x in (teacher.softmax(1), student.log_softmax(1)))
    return mean_over(-weight * log_prob, rows)


def non_target_term(
    student: Tensor, teacher: Tensor, labels: Tensor, rows: Tensor, temperature: float
) -> Tensor:
    """L_n = -tau^2 mean sum_{k != y} softmax(t' / tau)_k log softmax(s' / tau)_k.

    t', s' are t, s without column y, so both distributions sum to 1 over the other classes. A
    cross-entropy: where s = t it is the teacher's entropy, not 0. The paper's gamma is the term's
    weight.

    Args:
        student, teacher: (R, K+1) with K >= 2. labels, rows: as in `target_term`.
        temperature: tau > 0.
    """
    own, taught = (without_label(x, labels) / temperature for x in (student, teacher))
    entropy = -(taught.softmax(1) * own.log_softmax(1)).sum(1)
    return temperature**2 * mean_over(entropy, rows)


def teacher_free_term(student: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """L = -mean w log p with p = softmax(s)[y] and w = p + 1 - mean p, without gradient in w.

    The batch mean of p is over the rows used. The first revision of the paper, for hard labels.

    Args:
        as in `target_term`.
    """
    log_prob = of_label(student.log_softmax(1), labels)
    prob = log_prob.detach().exp()
    weight = prob + 1 - mean_over(prob, rows)
    return mean_over(-weight * log_prob, rows)


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    """(R, K+1) → (R,): the column of each row's label; of one that is ignored the first."""
    return values.gather(1, labels.clamp(min=0)[:, None])[:, 0]


def without_label(values: Tensor, labels: Tensor) -> Tensor:
    """(R, K+1) → (R, K): each row without the column of its label."""
    columns = torch.arange(values.shape[1] - 1, device=values.device)
    return values.gather(1, columns + (columns >= labels.clamp(min=0)[:, None]))


def row_sets(regions: Regions) -> Dict[str, Tensor]:
    """Prefix of a term's name → the rows that it is about; a label of -1 is in neither."""
    return {"": regions.positive, "background_": regions.labels == regions.num_classes}


@METHOD_REGISTRY.register()
class NKD(Method):
    """L = L_t + gamma L_n over objects; the same over background with weights of their own.

    Args:
        weights: of `terms`. temperature: tau of L_n, > 0.
    """

    terms = ("target", "non_target", "background_target", "background_non_target")
    needs = frozenset({"teacher", "region_logits"})

    def __init__(self, weights: Mapping[str, float], temperature: float):
        super().__init__([], weights)
        self.temperature = temperature

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # The authors' for CNNs on ImageNet. Of CIFAR-100 gamma 3.5 and tau 3, of DeiT gamma 1.
        node.TARGET_WEIGHT = 1.0
        node.NON_TARGET_WEIGHT = 1.5  # gamma
        # Of the proposals without an object; unpublished, hence off.
        node.BACKGROUND_TARGET_WEIGHT = 0.0
        node.BACKGROUND_NON_TARGET_WEIGHT = 0.0
        node.TEMPERATURE = 1.0  # tau, of the non-target terms

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        if not 0 < node.TEMPERATURE < float("inf"):
            raise UserError(
                f"MODEL.DISTILLER.NKD.TEMPERATURE: {node.TEMPERATURE} is not above 0 and finite"
            )
        classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        keys = [k for k in ("NON_TARGET_WEIGHT", "BACKGROUND_NON_TARGET_WEIGHT") if node[k]]
        if classes < 2 and keys:
            raise UserError(
                f"MODEL.DISTILLER.NKD.{keys[0]}: {node[keys[0]]} with MODEL.ROI_HEADS.NUM_CLASSES "
                f"{classes}: beside the target one column is left of {classes + 1}, background "
                "included, and a distribution over it is always 1; set this weight to 0"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, levels) -> "NKD":
        node = cls.node(cfg)
        return cls(cls.weights_of(node), node.TEMPERATURE)

    def forward(self, batch: Batch) -> Table:
        """Each of `terms`, weighted, under "regions"."""
        regions, values = batch.regions, {}
        own, taught = regions.student.logits, regions.teacher.logits
        dtype = small_dtype(own, taught)
        own, taught = own.to(dtype), taught.detach().to(dtype)
        for prefix, rows in row_sets(regions).items():
            given = own, taught, regions.labels, rows
            values[f"{prefix}target"] = target_term(*given)
            values[f"{prefix}non_target"] = non_target_term(*given, self.temperature)
        return {"regions": self.weigh(values)}


@METHOD_REGISTRY.register()
class TfNKD(Method):
    """Teacher-free NKD: the student's own confidence takes the place of the teacher's."""

    terms = ("target", "background_target")
    needs = frozenset({"region_logits"})

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        node.TARGET_WEIGHT = 1.0
        # Of the proposals without an object; unpublished, hence off.
        node.BACKGROUND_TARGET_WEIGHT = 0.0

    def forward(self, batch: Batch) -> Table:
        """Each of `terms`, weighted, under "regions"."""
        regions = batch.regions
        logits = regions.student.logits
        logits = logits.to(small_dtype(logits, logits))
        values = {
            f"{prefix}target": teacher_free_term(logits, regions.labels, rows)
            for prefix, rows in row_sets(regions).items()
        }
        return {"regions": self.weigh(values)}
