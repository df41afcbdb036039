"""Cascade R-CNN as a graph, with or without a mask head."""

from detectron2.modeling.roi_heads import CascadeROIHeads

from deploy.errors import UserError
from deploy.graphs.rcnn import ExportableRCNN

STAGES = 3


class ExportableCascadeRCNN(ExportableRCNN):
    """As `ExportableRCNN`, with Detectron2's `CascadeROIHeads`.

    Each of the three stages pools the boxes that the one before it made of the same proposals;
    scores are the mean of the stages' softmax, boxes the last stage's.
    """

    # NMS takes its settings from the last stage's predictor
    threshold_path = f"roi_heads.box_predictor.{STAGES - 1}.test_score_thresh"
    heads_kind = CascadeROIHeads

    @staticmethod
    def stages(heads):
        return list(zip(heads.box_head, heads.box_predictor))

    @classmethod
    def check_kind(cls, student):
        super().check_kind(student)
        predictors = student.roi_heads.box_predictor
        if len(predictors) != STAGES:
            raise UserError(
                f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS: {len(predictors)} stages cannot be exported, "
                f"only {STAGES} can"
            )
        if any(predictor.bbox_pred.out_features != 4 for predictor in predictors):
            raise UserError(
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG: only a class-agnostic cascade can be "
                "exported"
            )
