"""From a COCO JSON to configs of a teacher, a student and the distilled student.

    python -m fgd.start --train train.json --images photos --budget 60 --output mine

prints what it found, sets validation images apart, and test images unless --test names some, times
a few steps, and writes teacher.yaml, student.yaml and distil.yaml, in which comments say why values
are as they are. It ends with the commands to type. Nothing is overwritten.

Exit codes: 0 done, 2 usage, path or data, 3 a loss of a timed step was infinite, 130 stopped.
"""

import argparse
import logging
import math
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import torch

from fgd_inputs.names import one_line

from ..config import check_device
from ..errors import DivergedError, UserError
from ..files import atomic_write, check_output_dir
from . import anchors, pace, survey
from .families import DETECTORS
from .recipe import (
    DISTIL,
    STUDENT,
    STUDY,
    TEACHER,
    Recipe,
    are_alike,
    batch_size,
    weights_installed,
)
from .sets import PARTS, Sets, Source, read_sets

ARM = "inherit+FGD"  # of the study; it measures its factor
STOPPED = 130  # by Ctrl-C, as a shell says it


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fgd.start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", required=True, metavar="JSON", help="COCO format, with boxes")
    parser.add_argument("--images", default="", metavar="DIR", help="default: as for training")
    uses = {"valid": "chooses the checkpoint", "test": "gives the figures"}
    for part in PARTS:
        own = f"{uses[part]}; default: images of --train that are set apart"
        parser.add_argument(f"--{part}", default="", metavar="JSON", help=own)
        parser.add_argument(f"--{part}-images", default="", metavar="DIR", help="default: --images")
    parser.add_argument("--detector", choices=list(DETECTORS), default="retinanet")
    parser.add_argument(
        "--budget",
        type=_minutes,
        default=60.0,
        metavar="MINUTES",
        help="of training, for teacher, student and distilled student (default: %(default)g)",
    )
    parser.add_argument("--from-scratch", action="store_true", help="without ImageNet weights")
    parser.add_argument("--device", default="", help="default: cuda if there is one, else cpu")
    parser.add_argument("--output", required=True, metavar="DIR", help="for all that is written")
    return parser


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes")
    return value


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write the configs; 2 for an error of the user's."""
    args = build_parser().parse_args(argv)
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    try:
        run(args)
    except (UserError, DivergedError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return getattr(error, "exit_code", UserError.exit_code)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return STOPPED
    return 0


def run(args: argparse.Namespace) -> None:
    """See the module.

    Raises:
        UserError: a file that is to be written is there; or the data cannot be used.
    """
    output = os.path.expanduser(args.output)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device, "--device")
    others = {
        part: Source.of(getattr(args, part), getattr(args, f"{part}_images") or args.images)
        for part in PARTS
        if getattr(args, part)
    }
    made = [f"{part}.json" for part in ("train", *PARTS) if part not in others]
    _refuse_existing(output, [*made, STUDENT, TEACHER, DISTIL])
    check_output_dir(output, "--output")
    detector = DETECTORS[args.detector]
    sets = read_sets(Source.of(args.train, args.images), others, detector.masks)
    _say(*survey.lines(sets.survey, sets.bad))
    if sets.survey.found.states_masks and not detector.masks:
        _say("objects have masks, which --detector mask_rcnn learns")
    _say(*sets.lines())
    recipe = make_recipe(sets, args.detector, device, output, not args.from_scratch)
    _say(*recipe.lines())
    files = sets.files()
    _say(time_steps(recipe, sets, files, args.budget))
    write(output, {**files, **{k: v.encode() for k, v in recipe.texts().items()}})
    _say("", "Next:", *commands(recipe, sets.photo()))


def make_recipe(sets: Sets, detector: str, device: str, output: str, pretrained: bool) -> Recipe:
    """What the data asks for; not timed yet."""
    own, seen = DETECTORS[detector], sets.training
    size = survey.input_size(seen)
    levels = survey.levels(seen.sides(size), own.two_stage)
    chosen = None
    if own.anchored:
        chosen = anchors.choose(seen.scaled(size), levels.strides, own.two_stage)
    return Recipe(
        own,
        seen,
        size,
        levels,
        chosen,
        sets.keys(os.path.abspath(output)),
        output,
        device,
        pretrained and weights_installed(),
        are_alike(sets.grey[sets.parts["train"]]),
        batch_size(size, own.two_stage, int((seen.per_image > 0).sum())),
        mask_format=sets.mask_format,
    )


def time_steps(recipe: Recipe, sets: Sets, files: Dict[str, bytes], minutes: float) -> str:
    """Fill in the iterations that a budget buys, and the batch that fits; a sentence on both."""
    with tempfile.TemporaryDirectory() as folder:
        while True:
            texts = {name: text.encode() for name, text in recipe.texts().items()}
            for name, content in {**files, **texts}.items():
                Path(folder, name).write_bytes(content)
            try:
                found = pace.measure(Path(folder), sets.keys(folder))
                break
            except torch.OutOfMemoryError:
                if recipe.batch == 1:
                    raise UserError(
                        f"{recipe.device} has no memory for a step of one image"
                    ) from None
                recipe.batch //= 2
    images = int((recipe.survey.per_image > 0).sum())
    plan = pace.schedule(found, minutes, recipe.batch, images)
    recipe.iterations = plan.student, plan.teacher
    recipe.paced = found.in_words(recipe.device)
    return f"{recipe.paced}, {recipe.batch} images each\n{plan.in_words(minutes)}"


def write(output: str, files: Dict[str, bytes]) -> None:
    """Write all files, or none; UserError if one is there."""
    _refuse_existing(output, list(files))
    written: List[str] = []
    try:
        for name, content in files.items():
            atomic_write(os.path.join(output, name), lambda file, own=content: file.write(own))
            written.append(name)
    except BaseException:
        for name in written:
            os.remove(os.path.join(output, name))
        raise
    _say(f"written to {output}: {', '.join(files)}")


def _refuse_existing(output: str, names: Sequence[str]) -> None:
    for name in names:
        path = os.path.join(output, name)
        if os.path.lexists(path):
            raise UserError(f"{path} is there, and nothing is overwritten; take another --output")


def commands(recipe: Recipe, photo: str) -> List[str]:
    """Study, export and predict, as a shell takes them."""
    output, best = recipe.output, os.path.join(recipe.output, STUDY, f"{ARM}_0", "model_best")
    config, teacher = (os.path.join(output, name) for name in (DISTIL, TEACHER))
    study = ["-m", "fgd.study", "--config-file", config, "--teacher", teacher]
    study += ["--arms", f"student,{ARM}", "--select", "best"]
    if recipe.device == "cpu":  # as the steps were timed
        study += ["--jobs", "1", "--threads", str(torch.get_num_threads())]
    study += ["--output", os.path.join(output, STUDY)]
    export = ["-m", "deploy.export", f"{best}.pth"]
    if recipe.size.shape != "landscape":  # which is the default
        export += ["--size", *map(str, recipe.size.canvas)]
    predict = ["-m", "deploy.predict", os.path.join(f"{best}_onnx", "model.onnx"), photo]
    predict += ["--output", os.path.join(output, "predictions")]
    return [shlex.join(["python", *words]) for words in (study, export, predict)]


def _say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
