"""Batches for methods without a detector around them."""

from detectron2.structures import Boxes, Instances

from fgd.methods.batch import Batch


def make_batch(student, teacher, boxes, size, classes=None, image_sizes=None, **options):
    """A `Batch` of maps and boxes: ``size`` (height, width) is that of the padded batch.

    Args:
        boxes: of each image, (R, 4) XYXY in pixels. classes: (R,) of each; 0 by default.
    """
    sizes = image_sizes or [size] * len(boxes)
    instances = []
    for n, (own, image_size) in enumerate(zip(boxes, sizes, strict=True)):
        labels = own.new_zeros(len(own)).long() if classes is None else classes[n]
        instances.append(Instances(tuple(image_size), gt_boxes=Boxes(own), gt_classes=labels))
    return Batch(student, teacher, instances, [tuple(x) for x in sizes], tuple(size), **options)
