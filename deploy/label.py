"""Command: a teacher labels images; writes a COCO JSON that DATASETS.JSON.TRAIN takes.

Of a graph numpy, Pillow, onnxruntime and pycocotools only; PyTorch and Detectron2 are imported for
a checkpoint.
"""

import argparse
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from deploy.coco_ap import box_outcomes
from deploy.coco_data import CocoData, load_dataset
from deploy.errors import UserError, run_main
from deploy.evaluate import check_size
from deploy.files import content_sha256, make_folder
from deploy.labels.dataset import LabelFile, Labelled, check_output, common_folder
from deploy.labels.gate import Threshold, choose_thresholds, parse_precisions
from deploy.labels.teacher import Teacher, as_result, check_classes, load_teacher
from deploy.serving import time_limit
from deploy.serving.journal import Journal, Note
from deploy.serving.many_images import say
from deploy.serving.progress import show_progress
from fgd_inputs.coco import CocoFile, read_coco, read_test_set
from fgd_inputs.file_names import find_images
from fgd_inputs.folder_lock import locked
from fgd_inputs.image_contents import equal_files, look_up
from fgd_inputs.names import one_line

_EXAMPLES = """examples:
  python deploy/label.py teacher/model_final.pth photos/ --output labels.json \\
      --validate labelled.json
  python deploy/label.py teacher.onnx photos/ --output labels.json --validate labelled.json \\
      --precision 0.9 --precision Platelets=0.7 --add train_20_percent.json --exclude test.json

First the teacher is scored on --validate, images that people labelled and it was not trained on:
below --min-ap50 nothing is written, and for each class the lowest score is chosen whose boxes reach
--precision. Class names must be the same, in the same order. Images that are equal in content to
one of --validate, --add or --exclude are not labelled.

OUTPUT.jsonl is written as the run goes on; after an interruption the same command with --resume
keeps what is done. With --resume another --precision costs no more than the validation.

Exit codes: 0 done; 2 bad usage, the teacher is not good enough, or some images failed: they are
named and left out, the others are labelled; 130 interrupted.
"""
_BESIDE = "put them into a folder images beside it"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Label images with a teacher, for training.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="checkpoint written by train_net.py, or .onnx file by deploy/export.py")
    add("images", nargs="+", help="image files, or folders of them")
    add("--output", required=True, help="the .json file to write")
    add("--validate", required=True, metavar="JSON", help="COCO file of images with labels")
    add("--validate-images", metavar="FOLDER", help='its images (default: "images" beside it)')
    add(
        "--min-ap50",
        type=float,
        default=50.0,
        help="least AP50 of the teacher there, in percent (%(default)s)",
    )
    add(
        "--precision",
        action="append",
        default=[],
        metavar="P",
        help="share of right boxes wanted, or CLASS=P, or CLASS=none; again for more (0.9)",
    )
    add("--add", metavar="JSON", help="COCO file whose images and labels are written too")
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="PATH",
        help="JSON or folder of images to leave out",
    )
    add("--resume", action="store_true", help="keep what is finished in OUTPUT.jsonl")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    time_limit.add_option(parser)
    add("--debug", action="store_true", help="traceback on errors")
    return parser


class Validated(NamedTuple):
    """The teacher on labelled images."""

    ap50: float
    thresholds: Dict[str, Threshold]
    seconds: float


def validate(
    teacher: Teacher, data: CocoData, min_ap50: float, precisions: Dict[str, Optional[float]]
) -> Validated:
    """Score the teacher and choose a threshold for each class.

    Raises:
        UserError: it is below ``min_ap50``; see also `choose_thresholds`.
    """
    begin, results = time.perf_counter(), []
    for i, record in enumerate(data.images, 1):
        entry = teacher.detect(Path(record["file"]))
        check_size(record, (entry["height"], entry["width"]))
        results.append(as_result(entry))
        show_progress(i, len(data.images))
    ap50, outcomes = box_outcomes(data, teacher.classes, results)
    if not ap50 >= min_ap50:
        raise UserError(
            f"{teacher.name} has AP50 {ap50:.1f} on {data.name}, below --min-ap50 {min_ap50:g}: "
            "nothing was written. Use a better teacher, or ask for less"
        )
    chosen = choose_thresholds(outcomes, precisions, data.name)
    return Validated(ap50, chosen, time.perf_counter() - begin)


def label_each(
    teacher: Teacher, files: Sequence[Path], journal: Journal
) -> Tuple[List[Labelled], List[Dict[str, str]]]:
    """What is found in each file, and the files that cannot be used, with the reason."""
    found, failed = [], []
    for i, file in enumerate(files, 1):
        made_of = content_sha256(file) or "none"
        entry = journal.entry(file, made_of, None)
        try:
            if entry is None:
                begin = time.perf_counter()
                entry = teacher.detect(file)
                entry["seconds"] = round(time.perf_counter() - begin, 4)
                journal.add([Note(file, made_of, None, entry)])
            found.append(Labelled(str(file), entry, made_of))
        except UserError as error:
            failed.append({"file": str(file), "error": str(error)})
        show_progress(i, len(files))
    return found, failed


def without_known(files: Sequence[Path], known: Sequence[str]) -> List[Path]:
    """Without those whose content is that of a known image."""
    names = [str(file) for file in files]
    there = equal_files(look_up(names), look_up(known))
    return [file for i, file in enumerate(files) if i not in there]


def _known(args, data: CocoData) -> Tuple[Optional[CocoFile], List[str]]:
    """What --add holds, and the files of all images that are not to be labelled."""
    added = read_test_set(args.add, masks=True, hint=_BESIDE) if args.add else None
    images = [*data.images, *(added.images if added else ())]
    excluded = [file for path in args.exclude for file in _images_of(path)]
    return added, [*(image["file"] for image in images), *excluded]


def _images_of(path: str) -> List[str]:
    """Of a folder or of a COCO JSON."""
    if Path(path).is_dir():
        return [str(file) for file in find_images([path])]
    return [x["file"] for x in read_coco(path, annotated=False, hint=_BESIDE).images]


def _check_usage(args) -> None:
    if not 0 <= args.min_ap50 <= 100:
        raise UserError(f"--min-ap50 is {args.min_ap50:g}, expected a percentage")
    inputs = [args.model, args.validate, *args.exclude, *([args.add] if args.add else [])]
    check_output(Path(args.output), inputs)


def _main(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    time_limit.limit_time(args.time_limit)
    _check_usage(args)
    # all that can be refused is refused before the first image is run
    files = find_images(args.images)
    data = load_dataset(args.validate, args.validate_images, option="--validate-images")
    added, known = _known(args, data)
    waiting = without_known(files, known)
    if not waiting:
        raise UserError(f"all {len(files)} images have labels or are excluded: none to label")
    teacher = load_teacher(args.model, args.device)
    check_classes(teacher, [x["name"] for x in data.truth["categories"]], args.validate)
    if added:
        check_classes(teacher, added.class_names, args.add)
    precisions = parse_precisions(args.precision, teacher.classes)
    validated = validate(teacher, data, args.min_ap50, precisions)
    _print_thresholds(args, validated)
    if len(waiting) < len(files):
        say(f"{len(files) - len(waiting)} images have labels or are excluded, and are left out")
    return _label(args, teacher, waiting, data, added, validated)


def _label(args, teacher, files, data: CocoData, added, validated: Validated) -> int:
    output = Path(args.output)
    make_folder(output.absolute().parent)
    with locked(str(output.absolute().parent), "the folder of --output", "run", say, say):
        settings = {"model": teacher.sha256, "command": "label.py"}
        journal = Journal(f"{output}.jsonl", settings, args.resume)
        found, failed = label_each(teacher, files, journal)
        for failure in failed:
            say(f"failed: {failure['file']}: {failure['error']}")
        more = [image["file"] for image in added.images] if added else []
        folder = common_folder([*map(str, files), *more])
        labels = LabelFile(teacher, validated.thresholds, data.truth["categories"], folder)
        labels.add_found(found)
        boxes, empty = len(labels.annotations), labels.empty_images
        if not boxes:
            raise UserError(
                f"no box of {len(files)} images reaches its class's threshold: nothing was written"
            )
        if added:
            labels.add_known(added)
        labels.write(output, _facts(args, data, validated, found, failed))
    print(
        f"{len(found)} images with {boxes} boxes of the teacher, {empty} of them without any, "
        f"{len(failed)} failed. For training: DATASETS.JSON.TRAIN {one_line(str(output))} "
        f"DATASETS.JSON.TRAIN_IMAGES {one_line(folder)}"
    )
    return 2 if failed else 0


def _facts(args, data: CocoData, validated: Validated, found, failed) -> Dict[str, Any]:
    labelling = sum(labelled.entry["seconds"] for labelled in found)
    return {
        "validated_on": {
            "file": args.validate,
            "sha256": content_sha256(args.validate),
            "images": len(data.images),
            "ap50": round(validated.ap50, 3),
        },
        "added": {"file": args.add, "sha256": content_sha256(args.add)} if args.add else None,
        "seconds": round(validated.seconds + labelling, 3),
        "failed": failed,
    }


def _print_thresholds(args, validated: Validated) -> None:
    print(f"AP50 {validated.ap50:.1f} on {one_line(args.validate)}")
    for name, x in validated.thresholds.items():
        print(
            f"{one_line(name)}: from score {x.score:.3f} on, precision {x.precision:.3f} "
            f"(asked {x.wanted:g}), recall {x.recall:.3f}, {x.boxes} boxes"
        )


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit code: 0 done, 2 bad usage, teacher or images, 130 interrupted."""
    return run_main(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
