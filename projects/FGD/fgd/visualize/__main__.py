"""What did the loss look at? The method's pictures of student and teacher, level by level.

    python -m fgd.visualize output/model_final.pth photos/*.jpg --dataset annotations.json

writes a picture and the arrays behind it (.npz) for each image: of FGD the weights of foreground
and background, the spatial attention of teacher and student and its difference (student - teacher),
as the loss uses them; of most methods where the maps respond. The image gets the config's test
size; boxes are the ground truth of --dataset, or else what the student detects.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from fgd_inputs.coco import read_coco
from fgd_inputs.file_names import find_entries
from fgd_inputs.names import one_line

from ..data.json_sets import records
from ..distillation.distiller import Distiller
from ..errors import UserError
from ..files import atomic_write
from .figures import picture_figure, rgb_pixels
from .maps import PictureRecorder, record_pictures
from .run import load_inputs, open_run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fgd.visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="of a distilled training")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--dataset", default="", help="COCO JSON with the boxes of the images")
    parser.add_argument("--teacher", default="", help="where the teacher's weights lie now")
    parser.add_argument("--teacher-config", default="", help="where the teacher's config lies now")
    parser.add_argument("--score", type=float, default=0.5, help="of detections, at least")
    parser.add_argument("--output", type=Path, help="folder; default: CHECKPOINT_maps")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Draw every image; 2 if something cannot be read or used."""
    args = build_parser().parse_args(argv)
    try:
        truth = find_records(args.dataset, args.images) if args.dataset else {}
        distiller, cfg = open_run(args.checkpoint, args.teacher, args.teacher_config)
        folder = args.output or Path(f"{os.path.splitext(args.checkpoint)[0]}_maps")
        folder.mkdir(parents=True, exist_ok=True)
        for path, name in zip(args.images, unique_names(args.images)):
            inputs = load_inputs(path, cfg, truth.get(path))
            title = "ground truth" if args.dataset else "detections"
            if not args.dataset:
                inputs["instances"] = detections(distiller, inputs, args.score)
            recorded = record_pictures(distiller, inputs)
            if not recorded.pictures:
                raise UserError(f"{cfg.MODEL.DISTILLER.METHOD} uses no maps that could be drawn")
            for written in save(folder / name, inputs, recorded, cfg.INPUT.FORMAT, title):
                print(
                    f"{one_line(str(written))} ({len(inputs['instances'])} boxes, {title})",
                    flush=True,
                )
    except (UserError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def unique_names(paths: Sequence[str]) -> List[str]:
    """File names without endings; of equal ones all but the first get a number."""
    names: List[str] = []
    for path in paths:
        stem, number = Path(path).stem, 2
        name = stem
        while name in names:
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
    return names


def find_records(json_file: str, paths: Sequence[str]) -> Dict[str, dict]:
    """Detectron2 dataset dicts by image path, without the boxes that training leaves out.

    An image belongs to the entry whose file name its path ends in.

    Raises:
        UserError: the JSON is not COCO's, or has not exactly one entry for an image.
    """
    coco = read_coco(json_file, files=False)
    coco.check_boxes()
    for image in coco.images:
        image["file"] = image["file_name"]
    entries, note = find_entries(json_file, [x["file"] for x in coco.images], paths)
    for text in [*coco.notes, *coco.warnings, note, coco.dropped_text()]:
        if text:
            print(f"{one_line(json_file)}: {text}", flush=True)
    all_records = records(coco)
    return {path: {**all_records[i], "file_name": path} for path, i in zip(paths, entries)}


@torch.no_grad()
def detections(distiller: Distiller, inputs: dict, score: float) -> Instances:
    """What the student finds with at least ``score``, in the shape of a ground truth."""
    (output,) = distiller([{"image": inputs["image"]}])  # no size: boxes in pixels of the input
    found = output["instances"].to("cpu")
    boxes = found.pred_boxes.tensor[found.scores >= score]
    return Instances(tuple(inputs["image"].shape[-2:]), gt_boxes=Boxes(boxes))


def save(
    stem: Path, inputs: dict, recorded: PictureRecorder, image_format: str, title: str
) -> List[Path]:
    """Write ``stem``.png and ``stem``.npz, each completely or not at all; returns their paths.

    The arrays: "p3/foreground" and so on of every level, with _ for the spaces of captions;
    "boxes" (R, 4) XYXY in pixels of the network's input, "image_size" and "padded_size" (height,
    width).
    """
    boxes = inputs["instances"].gt_boxes.tensor
    arrays = {
        "boxes": boxes.numpy(),
        "image_size": np.array(inputs["image"].shape[-2:]),
        "padded_size": np.array(recorded.padded_size),
    }
    for level, own in recorded.pictures.items():
        arrays.update({f"{level}/{k.replace(' ', '_')}": v.values for k, v in own.items()})
    image = rgb_pixels(inputs["image"], image_format)
    figure = picture_figure(image, boxes, recorded.pictures, recorded.padded_size, title)
    png, npz = (stem.with_name(f"{stem.name}{end}") for end in (".png", ".npz"))
    atomic_write(str(npz), lambda file: np.savez_compressed(file, **arrays))
    atomic_write(str(png), lambda file: figure.savefig(file, format="png", dpi=110))
    return [png, npz]


if __name__ == "__main__":
    raise SystemExit(main())
