"""Regions for methods without a detector around them."""

import torch

from fgd.methods.batch import Regions, RegionView

from .batches import make_batch


def make_regions(student, teacher=None, labels=(), num_classes=None, deltas=None, **options):
    """`Regions` of logits (R, K+1); ``deltas``: of both sides. All boxes are of one image."""
    count = len(student)
    deltas = deltas or (None, None)
    boxes = options.pop("boxes", torch.zeros(count, 4))
    views = [
        None if logits is None else RegionView(None, None, logits, own)
        for logits, own in zip((student, teacher), deltas, strict=True)
    ]
    return Regions(
        boxes=[boxes],
        labels=torch.as_tensor(labels),
        targets=options.pop("targets", torch.zeros(count, 4)),
        num_classes=student.shape[1] - 1 if num_classes is None else num_classes,
        student=views[0],
        teacher=views[1],
        **options,
    )


def batch_of(regions):
    """A `Batch` of one image without maps."""
    return make_batch({}, {}, [torch.zeros(0, 4)], (32, 32), regions=regions)
