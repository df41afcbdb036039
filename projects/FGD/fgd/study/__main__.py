"""Does distillation pay? The same student, schedule and seeds with and without it.

    python -m fgd.study --config-file configs/quick/shapes_fgd_retinanet.yaml \\
        --teacher configs/quick/shapes_teacher_retinanet.yaml \\
        --arms student,inherit,inherit+distil,student-long --seeds 0,1,2 --output output/study

trains the teacher once, then every arm with every seed, and writes study.md, study.html and
study.json. Runs that are finished are not repeated, interrupted ones are resumed: call it again
after any stop.

Arms: student (alone); inherit (starts from the teacher's neck and head); distil and inherit+distil
(the config's method); METHOD and inherit+METHOD (any method, or a sum such as FGD+NKD);
student-long (alone, for the time that distillation takes in this study); and ablations that
switch off one term of the config's method (of FGD no-foreground, no-background, no-attention or
no-relation) or all but one (only-foreground ...).

Pictures without labels: pseudo (the student alone, trained on --labels, a file of deploy/label.py),
pseudo+distil (the main arm on it), and unlabeled (the main arm with the config's
DATASETS.JSON.UNLABELED_IMAGES, which all other arms are trained without). pseudo-timed,
pseudo+distil-timed and unlabeled-timed train for the time that the main arm takes, in which making
the labels is counted.

Several teachers in a row: stages (every config of --stages from the student of the one before) and
single-long (the last of these alone, for the iterations of all).

--select best reports each student by the checkpoint that a validation set chose.

An arm that names a method measures MODEL.DISTILLER.FACTOR at the start of each run, as --balance of
train_net.py does, unless --factor gives one or MODEL.DISTILLER.FACTOR is among the options.

Exit codes: 0 done, 2 usage, config, path or data, 75 stopped by a signal; otherwise that of the
first run that failed. The others go on, and the pages then say which is missing.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from detectron2.config import CfgNode

from fgd_inputs.folder_lock import locked
from fgd_inputs.names import one_line

from ..errors import UserError
from ..files import check_output_dir, remove_stale_temporaries
from . import budget
from .arms import ARMS, SINGLE, STAGES, TIMED, main_arms, study_config
from .comparisons import number_of_tests
from .earlier import check_earlier, with_test_data
from .factors import given_factors
from .facts import facts, how_tested
from .files import disbelieved, is_finished, no_ap, write_json, write_text
from .headline import best_arms, headline
from .labels import read_labels
from .latency import latency
from .page import html_page, markdown
from .pictures import draw
from .plan import plan, study_stages
from .report import sections
from .run import Run
from .runs import Failure, Runner, gpus
from .select import keeping_best, selected
from .stages import Stage, not_inheriting, stage_rows, wrong_starts
from .summary import Changes, changes, summarize

STOPPED = 75  # by a signal; call again


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fgd.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, help="config of the distilled student")
    parser.add_argument(
        "--teacher",
        default="",
        help="config of the teacher, to train it first; without it MODEL.DISTILLER.TEACHER.WEIGHTS "
        "is used and evaluated",
    )
    parser.add_argument(
        "--arms",
        default="student,inherit+distil",
        help=f"{', '.join(ARMS)}, METHOD, inherit+METHOD, no-TERM, only-TERM, {STAGES}, {SINGLE}",
    )
    parser.add_argument(
        "--factor",
        default="",
        metavar="NAME=NUMBER,...",
        help="MODEL.DISTILLER.FACTOR of arms that name a method, by method or arm, for example "
        "PKD=0.5,inherit+MGD=1; without one it is measured",
    )
    parser.add_argument(
        "--stages",
        default="",
        metavar="CONFIG,CONFIG,...",
        help=f"distillation configs, each with its own teacher, for the arms {STAGES} and {SINGLE}",
    )
    parser.add_argument(
        "--select",
        choices=("last", "best"),
        default="last",
        help="checkpoint of each student that is reported on the test set: its last, or the one "
        "that is best on the validation set (DATASETS.JSON.VALID) by SOLVER.KEEP_BEST",
    )
    parser.add_argument("--labels", default="", metavar="JSON", help="for pseudo, pseudo+distil")
    parser.add_argument("--seeds", default="0", help="for example 0,1,2")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    parser.add_argument(
        "--jobs", type=int, default=0, help="runs side by side; 0 = one per GPU, without GPUs 1"
    )
    parser.add_argument("--threads", type=int, default=0, help="per run; 0 = cores / jobs")
    parser.add_argument(
        "--resamples", type=int, default=1000, help="of the test images, to test changes of AP"
    )
    parser.add_argument(
        "--report", action="store_true", help="train nothing: pages of the runs that are finished"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for every run")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the study, write and print its report; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        if args.report:
            return _study(args)
        check_output_dir(str(args.output), "--output")
        with locked(str(args.output), "--output", "study", print, print):
            remove_stale_temporaries(str(args.output))
            return _study(args)
    except (UserError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return getattr(error, "exit_code", UserError.exit_code)
    except KeyboardInterrupt:
        print("stopped; what is finished stays, the same command goes on", file=sys.stderr)
        return STOPPED


def _study(args: argparse.Namespace) -> int:
    opts = _options(args.opts)
    if args.select == "best":
        opts = keeping_best(args.config_file, opts)
    arms = args.arms.split(",")
    cfg = study_config(args.config_file, opts)
    seeds, factors = _seeds(args.seeds), given_factors(args.factor, arms, opts)
    files = args.stages.split(",") if args.stages else []
    stages = study_stages(files, args.config_file, args.teacher, args.output, opts)
    planned = args.config_file, args.teacher, arms, seeds, args.output, opts
    labels = read_labels(args.labels, arms)
    runs = plan(*planned, factors=factors, stages=stages, labels=labels)
    runs = selected(runs) if args.select == "best" else runs
    check_earlier(runs)
    runs = with_test_data(runs, cfg)
    for line in not_inheriting(stages):
        print(line, flush=True)
    failures: List[Failure] = []
    if not args.report:
        devices = gpus(cfg.MODEL.DEVICE)
        jobs = args.jobs or len(devices) or 1
        threads = args.threads or max(1, (os.cpu_count() or 1) // jobs)
        parallel = jobs, threads, devices
        failures = Runner(runs, cfg, args.output, *parallel, labels.seconds).run_all()
    if not any(is_finished(run) for run in runs):
        print("error: no run has finished, so there is nothing to report", file=sys.stderr)
        return failures[0].exit_code if failures else UserError.exit_code
    report(args, runs, cfg, failures, stages)
    return failures[0].exit_code if failures else 0


def report(
    args,
    runs: Sequence[Run],
    cfg: CfgNode,
    failures: Sequence[Failure] = (),
    stages: Sequence[Stage] = (),
) -> None:
    """Print the tables; write study.json, study.md, study.html, and then their pictures.

    Raises:
        UserError: a file cannot be written. Those before it are whole.
    """
    study = collect(args, runs, cfg, failures, stages)
    shown = [section for section in sections(study, {}) if not section.folded]
    print(markdown(shown, one_line), flush=True)
    _write(args.output, study, {})
    distilled = main_arms(args.arms.split(","), cfg)
    shown = [*best_arms(study["changes"], distilled), *distilled, STAGES, SINGLE]
    pictures, not_drawn = draw(runs, study, shown, cfg, args.output)
    study["missing"] += not_drawn
    for line in not_drawn:
        print(line)
    _write(args.output, study, pictures)
    print(args.output / "study.html")


def _write(output: Path, study: Dict[str, Any], pictures: Dict[str, Path]) -> None:
    found = sections(study, pictures)
    write_json(output / "study.json", study)
    write_text(output / "study.md", markdown(found))
    write_text(output / "study.html", html_page(found))


def collect(
    args,
    runs: Sequence[Run],
    cfg: CfgNode,
    failures: Sequence[Failure],
    stages: Sequence[Stage] = (),
) -> Dict[str, Any]:
    """All that the pages say, part by part."""
    arms = args.arms.split(",")
    failed = {str(failure.run): str(failure) for failure in failures}
    missing = [
        failed.get(str(run)) or disbelieved(run) or f"{run}: not run"
        for run in runs
        if not is_finished(run)
    ]
    missing += [line for run in runs if is_finished(run) for line in no_ap(run)]
    missing += wrong_starts(runs)
    changed = Changes()
    try:
        changed = changes(runs, cfg, args.resamples)
    except UserError as error:
        missing.append(f"Changes between arms are not tested: {error}")
    rows, left = summarize(runs), sum(not is_finished(run) for run in runs)
    measured = {
        arm: settled
        for arm in (row["arm"] for row in rows)
        if arm in TIMED and (settled := budget.read_budget(arm, cfg, args.output))
    }
    return {
        "headline": headline(rows, changed.classes, main_arms(arms, cfg), measured)
        + ([f"{left} of {len(runs)} runs are missing."] if left else []),
        "facts": facts(args, runs, cfg, measured, stages, read_labels(args.labels, arms)),
        "missing": missing,
        "arms": rows,
        "budget": measured,
        "stages": stage_rows(runs, stages) if STAGES in arms else [],
        "changes": changed.classes,
        "sizes": changed.sizes,
        "latency": latency(runs, rows, cfg),
        "test": how_tested(args.resamples, *number_of_tests(*changed)),
    }


def _options(words: Sequence[str]) -> Dict[str, str]:
    if len(words) % 2:
        raise UserError(f"options come in pairs of KEY VALUE, found {' '.join(words)!r}")
    return dict(zip(words[::2], words[1::2], strict=True))


def _seeds(text: str) -> List[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds: {text!r} is not numbers with commas, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: {text} names a seed twice")
    return seeds


if __name__ == "__main__":
    raise SystemExit(main())
