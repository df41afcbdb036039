"""What datasets hold: digests of annotations and images, and images that two of them share."""

import hashlib
import os
from typing import Dict, List, NamedTuple, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from fgd_inputs.coco import CocoFile
from fgd_inputs.image_contents import ImageFile, equal_files, look_up, set_digest
from fgd_inputs.names import one_line

from ..files import file_sha256

__all__ = [
    "ImageSet",
    "chosen_images",
    "describe_names",
    "describe_sets",
    "registered_set",
    "shared_between",
    "shared_images",
]


class ImageSet(NamedTuple):
    """A dataset.

    Attributes:
        annotations: SHA-256 of its JSON; "" where it has none.
        files: paths of its images, in the order of their ids.
    """

    annotations: str
    files: List[str]


def chosen_images(found: CocoFile, limit: int = 0) -> List[dict]:
    """The images of a JSON; of more than ``limit`` so many, evenly spaced. 0 = all."""
    images = found.images
    if 0 < limit < len(images):
        images = [images[i * len(images) // limit] for i in range(limit)]
    return images


def registered_set(name: str) -> ImageSet:
    """Of a registered name; a JSON of the user's has been read already."""
    metadata = MetadataCatalog.get(name)
    known = metadata.get("image_set")
    if known is not None:
        return known
    path = metadata.get("json_file") or ""
    annotations = file_sha256(path) if os.path.isfile(path) else ""
    files = [record["file_name"] for record in DatasetCatalog.get(name)]
    metadata.image_set = ImageSet(annotations, files)  # to read COCO's takes a while
    return metadata.image_set


def describe_sets(sets: Sequence[ImageSet]) -> Dict[str, str]:
    """Digests of sets together: {"annotations": "" unless all have a JSON, "images"}.

    See `fgd_inputs.image_contents.set_digest` for what is looked at.
    """
    if len(sets) == 1:
        annotations = sets[0].annotations
    else:
        every = [own.annotations for own in sets]
        annotations = hashlib.sha256("\n".join(every).encode()).hexdigest() if all(every) else ""
    return {"annotations": annotations, "images": set_digest(_files(sets))}


def describe_names(names: Sequence[str]) -> Dict[str, str]:
    """The same of registered names; {} without any."""
    return describe_sets([registered_set(name) for name in names]) if names else {}


def shared_images(cfg: CfgNode) -> str:
    """A sentence on test images that are in the training set too, and so for the validation set;
    "" if none is.

    Args:
        cfg: with registered datasets.
    """
    files = {x: _files([registered_set(name) for name in cfg.DATASETS[x]]) for x in _NAMES}
    pairs = [("TRAIN", "TEST"), ("TRAIN", "VALID"), ("TEST", "VALID")]
    found = [_shared(files[a], files[b], _NAMES[a], _NAMES[b]) for a, b in pairs]
    return "; ".join(filter(None, found))


_NAMES = {"TRAIN": "training", "TEST": "test", "VALID": "validation"}


def shared_between(
    train: Sequence[ImageSet],
    test: Sequence[ImageSet],
    training_name: str = "training",
    test_name: str = "test",
) -> str:
    """The same of two sets that need not be registered."""
    return _shared(_files(train), _files(test), training_name, test_name)


def _files(sets: Sequence[ImageSet]) -> List[ImageFile]:
    return look_up([path for own in sets for path in own.files])


def _shared(
    trained: List[ImageFile], tested: List[ImageFile], training_name: str, test_name: str
) -> str:
    same = equal_files(tested, trained)
    if not same:
        return ""
    first = next(iter(same))
    ours, theirs = tested[first].path, trained[same[first]].path
    example = one_line(ours if ours == theirs else f"{ours} is {theirs}")
    every = "all" if len(same) == len(tested) else f"{len(same)} of"
    return (
        f"{every} {len(tested)} {test_name} images are in the {training_name} set too (the first: "
        f"{example}), so AP says little of other images"
    )
