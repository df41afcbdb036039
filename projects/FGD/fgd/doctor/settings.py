"""Config keys of the doctor."""

from detectron2.config import CfgNode

from ..errors import UserError

# Every check, in the order of the report. A fault of the first kind leaves nothing to train.
NEEDED = ("data", "classes", "weights", "formats", "levels")
CHECKS = (
    *NEEDED,
    "teacher_classes",
    "frozen",
    "optimizer",
    "losses",
    "gradients",
    "channels",
    "quality",
    "calibration",
)


def add_doctor_config(cfg: CfgNode) -> None:
    """Add the node DOCTOR, in place."""
    node = cfg.DOCTOR = type(cfg)()
    # Check briefly before step one of a new distilled run: BRIEF_IMAGES and one batch.
    node.BRIEF = True
    node.BRIEF_IMAGES = 8
    # What --doctor takes: training images on which the teacher is scored, and batches over which
    # the losses are averaged; --balance takes as many batches.
    node.IMAGES = 64
    node.BATCHES = 10
    # Least AP50 of the teacher's detections on those images, in percent. They are training images,
    # where real teachers had 89 to 100 and untrained ones at most 10. 0 = any teacher will do.
    node.MIN_AP50 = 20.0
    # Checks whose faults are known and accepted: they are shown as warnings and stop nothing. For
    # example ["teacher_classes"] for a teacher of other classes.
    node.ACCEPT = []


def check_doctor(cfg: CfgNode) -> None:
    """Raise UserError for a value of DOCTOR that means nothing; names key and value."""
    node = cfg.DOCTOR
    for key in ("BRIEF_IMAGES", "IMAGES", "BATCHES"):
        if node[key] < 1:
            raise UserError(f"DOCTOR.{key}: {node[key]} is not a number above 0")
    if not 0 <= node.MIN_AP50 <= 100:
        raise UserError(f"DOCTOR.MIN_AP50: {node.MIN_AP50} is not a percentage")
    for name in node.ACCEPT:
        if name not in CHECKS[len(NEEDED) :]:
            known = ", ".join(CHECKS[len(NEEDED) :])
            raise UserError(f"DOCTOR.ACCEPT: {name!r} is none of those that can be: {known}")
