"""A training set of which a share is labelled: what does one learn from the other images?

    python -m tools.few_labels bccd/annotations/instances_train.json --share 0.2 --output few/bccd

writes OUTPUT/labelled.json, with the entries of the images that were drawn, and a copy of every
other image into OUTPUT/unlabelled, for DATASETS.JSON.UNLABELED_IMAGES and deploy/label.py. The same
seed draws the same images.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Dict, Optional, Sequence

import numpy as np

from fgd.files import atomic_write
from fgd_inputs.coco import CocoFile, read_coco
from fgd_inputs.errors import UserError
from fgd_inputs.json_file import read_json
from fgd_inputs.names import one_line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.few_labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", help="COCO JSON of a training set")
    parser.add_argument("--images", default="", help="folder of its images, if not found beside it")
    parser.add_argument(
        "--share", type=float, required=True, help="of the images, above 0, below 1"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        found = read_coco(args.json, args.images)
        labelled = draw(len(found.images), args.share, args.seed)
        if args.output.exists():
            raise UserError(f"--output {args.output}: it exists; name another folder")
        write(args.json, found, labelled, args.output)
    except (UserError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    print(f"{args.output}: {labelled.sum()} labelled images, {(~labelled).sum()} others")
    return 0


def draw(images: int, share: float, seed: int) -> np.ndarray:
    """Which images are labelled, (images,) bool: ``share`` of them, rounded; none twice.

    Raises:
        UserError: that leaves none on one of the sides.
    """
    count = round(images * share) if 0 < share < 1 else 0
    if not 0 < count < images:
        raise UserError(f"--share {share:g} of {images} images is {count}: nothing to compare")
    chosen = np.zeros(images, bool)
    chosen[np.random.default_rng(seed).permutation(images)[:count]] = True
    return chosen


def write(path: str, found: CocoFile, labelled: np.ndarray, output: Path) -> None:
    """`labelled.json` and the folder of the others, as the module says.

    Entries are copied as they stand, with the full path of each image's file.
    """
    folder = output / "unlabelled"
    folder.mkdir(parents=True)
    files: Dict[str, str] = {}
    for image, mine in zip(found.images, labelled, strict=True):
        if mine:
            files[image["file_name"]] = str(Path(image["file"]).resolve())
        else:  # numbered, since names of different folders may be equal
            shutil.copy(image["file"], folder / f"{image['id']}_{Path(image['file']).name}")
    content = read_json(path, "dataset JSON")
    content["images"] = [
        {**image, "file_name": files[image["file_name"]]}
        for image in content["images"]
        if image["file_name"] in files
    ]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in kept]
    text = json.dumps(content).encode()
    atomic_write(str(output / "labelled.json"), lambda file: file.write(text))


if __name__ == "__main__":
    raise SystemExit(main())
