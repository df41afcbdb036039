"""Adversarial images of the training set: what a teacher misses, for methods that learn from it.

    python -m fgd.adversarial --config-file configs/ikd_retinanet.yaml

changes each training image a little, so that the classification losses of the config's teacher rise
most, and writes it as a PNG of the same size and name to DATASETS.TRAIN_SECOND_IMAGES or --output.
Once per teacher; stopped at any time, the same command goes on. On several GPUs start it once on
each, with --part 1/4, 2/4 and so on.
"""

import argparse
import sys
import time
from typing import List, Optional, Sequence, Tuple

from detectron2.config import CfgNode

from ..config import check_device, load_config
from ..data.checks import class_names
from ..data.datasets import register_from_config
from ..data.second_images import KEY, png_name, relative_names
from ..data.stream import training_records
from ..errors import UserError
from ..files import check_output_dir
from ..weights import weights_sha256
from .attack import Settings, check_settings
from .folder import Folder
from .victim import Victim

EVERY = 100  # images between two lines of progress, and two writes of the record


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fgd.adversarial",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Settings()
    parser.add_argument("--config-file", required=True, help="a distillation config")
    parser.add_argument("--output", default="", help=f"folder; default: {KEY} of the config")
    parser.add_argument(
        "--epsilon",
        type=float,
        default=8.0,
        help="largest change, of 255 levels of an image of full range (default: %(default)s)",
    )
    parser.add_argument(
        "--step", type=float, default=2.0, help="of each step (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--momentum", type=float, default=defaults.momentum)
    parser.add_argument("--diversity-prob", type=float, default=defaults.diversity_prob)
    parser.add_argument("--diversity-rate", type=float, default=defaults.diversity_rate)
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="I/N", help="one of N processes' shares"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser


def _part(text: str) -> Tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, as 1/4")
    return int(number), int(count)


def run(args: argparse.Namespace) -> None:
    """Make the images that are not there yet.

    Raises:
        UserError: see `Victim` and `Folder`; or an image cannot be read.
    """
    settings = Settings(
        args.epsilon / 255,
        args.step / 255,
        args.steps,
        args.momentum,
        args.diversity_prob,
        args.diversity_rate,
    )
    if problem := check_settings(settings):
        raise UserError(f"--{problem.replace('_', '-')}")
    cfg = load_config(args.config_file, args.opts)
    check_device(cfg.MODEL.DEVICE)
    output = args.output or cfg.DATASETS.TRAIN_SECOND_IMAGES
    if not output:
        raise UserError(f"name the folder with --output, or with {KEY} in the config")
    cfg = register_from_config(cfg, ("TRAIN",))
    check_output_dir(output)
    victim = Victim(cfg, class_names(cfg))
    folder = Folder(output, identity(cfg, settings))
    if args.part == (1, 1):
        folder.remove_temporaries()
    records = training_records(cfg)
    make_images(victim, folder, records, file_names(cfg, records), settings, args.part)


def identity(cfg: CfgNode, settings: Settings) -> dict:
    """What images depend on, for the folder's record."""
    weights = cfg.MODEL.DISTILLER.TEACHER.WEIGHTS
    return {
        "teacher": {"weights": weights, "sha256": weights_sha256(weights)},
        "datasets": list(cfg.DATASETS.TRAIN),
        "settings": {
            **settings._asdict(),
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
        },
    }


def file_names(cfg: CfgNode, records: Sequence[dict]) -> List[str]:
    """Name of each record's image in the folder.

    Raises:
        UserError: two images would have the same.
    """
    names = [png_name(name) for name in relative_names(records, cfg.DATASETS.TRAIN)]
    owners: dict = {}
    for name, record in zip(names, records):
        if owners.setdefault(name, record["file_name"]) != record["file_name"]:
            raise UserError(
                f"{owners[name]} and {record['file_name']} would both be written as {name}; "
                "rename one of them"
            )
    return names


def make_images(
    victim: Victim,
    folder: Folder,
    records: Sequence[dict],
    names: Sequence[str],
    settings: Settings,
    part: Tuple[int, int] = (1, 1),
) -> None:
    """Those of this part that are not there yet; the record says at the end which are."""
    number, count = part
    own = list(zip(names, records))[number - 1 :: count]
    waiting = [pair for pair in own if not folder.has(pair[0])]
    print(f"{len(waiting)} of {len(own)} images to make in {folder.path}", flush=True)
    begin = time.perf_counter()
    try:
        for done, (name, record) in enumerate(waiting, start=1):
            folder.save(name, victim.mislead(record, name, settings))
            if done % EVERY == 0:
                folder.write_record(names)
                left = (time.perf_counter() - begin) / done * (len(waiting) - done)
                print(f"{done} of {len(waiting)}, {left / 60:.0f} minutes left", flush=True)
    finally:
        found = folder.write_record(names)
    print(f"{len(found)} of {len(names)} training images have one: {KEY} {folder.path}")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Make the images of a config's training set; 2 for an error of the user's."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
