"""The second images of a batch, as student and teacher see them.

A step costs a second forward of both backbones, a second backward of the student's, and the memory
of the student's activations once more. Live batch norms of the student see the second images too,
after the first ones: their running statistics are of both.
"""

from typing import List, Optional, Tuple

from torch import nn

from ..methods.batch import SecondView
from .taps import Sources, after_norms, read_levels
from .teacher import FrozenTeacher


def has_second_images(batched_inputs: List[dict]) -> bool:
    return all("second_image" in x for x in batched_inputs)


def check_second_images(batched_inputs: List[dict], iteration: int, plain_from: int) -> None:
    """Terms that are 0 for want of images would go unnoticed.

    Args:
        plain_from: the iteration from which samples have none; 0 = never.
    Raises:
        ValueError: a sample has none before that.
    """
    if not has_second_images(batched_inputs) and not 0 < plain_from <= iteration:
        raise ValueError(
            "the method needs second images, and samples have no 'second_image'; build their "
            "stream with build_train_stream(cfg, second_images=True)"
        )


def look_again(
    student: nn.Module,
    teacher: Optional[FrozenTeacher],
    sources: Optional[Sources],
    batched_inputs: List[dict],
    padded_size: Tuple[int, int],
) -> SecondView:
    """Runs both backbones on "second_image" of each sample.

    Args:
        student: a detector, in its present mode. sources: of its backbone.
        padded_size: (height, width) of the batch of first images, which have the same sizes.
    """
    inputs = [{"image": x["second_image"]} for x in batched_inputs]
    images = student.preprocess_image(inputs).tensor
    own, _ = read_levels(student.backbone, images, after_norms(sources))
    taught = {}
    if teacher is not None:
        taught = teacher.look(inputs, padded_size, as_heads_read=True).maps
    return SecondView(own, taught)
