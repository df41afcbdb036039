"""The runs of a study: every arm with every seed, and the teacher."""

from pathlib import Path
from typing import Dict, List, Mapping, Sequence, Tuple

from detectron2.config import CfgNode

from ..distillation.config import check_distiller, needs_teacher, teacher_name
from ..distillation.lazy_teacher import is_lazy
from ..errors import UserError
from .arms import (
    SINGLE,
    STAGES,
    STUDENT,
    TEACHER,
    TIMED,
    base_arm,
    changes_of,
    check_arms,
    is_plain,
    method_of,
    study_config,
)
from .factors import KEY, is_measured
from .labels import NO_LABELS, LabelFile, label_changes
from .run import Run, Teacher
from .stages import Stage, chain, read_stages, single


def plan(
    config_file: str,
    teacher: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    opts: Dict[str, str],
    factors: Mapping[str, float] = {},
    stages: Sequence[Stage] = (),
    labels: LabelFile = NO_LABELS,
) -> List[Run]:
    """The runs of a study, in the order in which they are best started.

    Args:
        teacher: config of a teacher to train first; "" = MODEL.DISTILLER.TEACHER.WEIGHTS is used,
            and evaluated to know the gap that a student can close. A network of timm detects
            nothing: it is not evaluated, and no gap is known. Methods without a teacher need none.
        factors: arm → MODEL.DISTILLER.FACTOR (`given_factors`).
        stages: of the arms `stages` and `single-long` (`study_stages`).
        labels: of the arms `pseudo` and `pseudo+distil` (`read_labels`).
    Raises:
        UserError: see `check_arms`; there is no teacher, and an arm needs one; one of timm cannot
            be it; there are no stages; or the config refuses a method.
    """
    cfg = study_config(config_file, opts)
    check_arms(arms, cfg)
    _check_stages(arms, stages)
    _check_timm_teacher(cfg, teacher, arms)
    teaches = _teacher(teacher, cfg, output, opts)
    templates = []
    for arm in arms:
        if arm in (STAGES, SINGLE):
            continue
        changes = {**changes_of(arm, cfg), **label_changes(base_arm(arm), cfg, labels)}
        planned = {**opts, **changes}
        own, needs = _options(arm, config_file, cfg, planned, teaches, factors)
        balance = is_measured(arm, factors, opts)
        templates.append(Run(arm, 0, config_file, output, own, needs, balance=balance))
    runs = [
        run._replace(seed=seed, folder=output / f"{run.arm}_{seed}")
        for seed in seeds
        for run in templates
    ]
    for seed in seeds:
        runs += chain(stages, seed, output) if STAGES in arms else []
        runs += [single(stages, seed, output)] if SINGLE in arms else []
    order = {STUDENT: 1, **dict.fromkeys(TIMED, 3)}
    return [*teaches.runs, *sorted(runs, key=lambda run: order.get(run.arm, 2))]


def study_stages(
    files: Sequence[str], config_file: str, teacher: str, output: Path, opts: Dict[str, str]
) -> List[Stage]:
    """The stages that configs name, for `plan`, whose other arguments these are; [] without any.

    Raises:
        UserError: see `read_stages`.
    """
    cfg = study_config(config_file, opts)
    return read_stages(files, cfg, opts, _teacher(teacher, cfg, output, opts)) if files else []


def _check_stages(arms: Sequence[str], stages: Sequence[Stage]) -> None:
    wanted = [arm for arm in (STAGES, SINGLE) if arm in arms]
    if wanted and not stages:
        raise UserError(f"--arms: {wanted[0]} needs --stages, a config for each teacher")
    if stages and not wanted:
        raise UserError(f"--stages: no arm uses them; add {STAGES} or {SINGLE} to --arms")


def _teacher(config: str, cfg: CfgNode, output: Path, opts: Mapping[str, str]) -> Teacher:
    weights, folder = str(cfg.MODEL.DISTILLER.TEACHER.WEIGHTS), output / TEACHER
    if config:
        run = Run(TEACHER, 0, config, folder, _data_options(opts))
        return Teacher(True, str(folder / "model_final.pth"), (TEACHER,), (run,))
    node = cfg.MODEL.DISTILLER.TEACHER
    if not weights or node.TIMM or is_lazy(node.CONFIG_FILE):  # no yaml to evaluate it with
        return Teacher(given=bool(teacher_name(cfg)))
    file = str(folder / "evaluated.yaml")  # written when the run starts
    run = Run(TEACHER, 0, file, folder, {"MODEL.WEIGHTS": weights}, eval_only=True)
    return Teacher(True, weights, (), (run,))


def _check_timm_teacher(cfg: CfgNode, teacher: str, arms: Sequence[str]) -> None:
    timm = cfg.MODEL.DISTILLER.TEACHER.TIMM
    key = f"MODEL.DISTILLER.TEACHER.TIMM {timm}"
    if timm and teacher:
        raise UserError(f"--teacher {teacher} and {key} are two teachers; leave one out")
    inheriting = [arm for arm in arms if arm.startswith("inherit")]
    if timm and inheriting:
        raise UserError(
            f"--arms: {', '.join(inheriting)}: {key} has no neck and no head to inherit; take "
            "student,distil"
        )


def _options(
    arm: str,
    config_file: str,
    cfg: CfgNode,
    opts: Mapping[str, str],
    teacher: Teacher,
    factors: Mapping[str, float],
) -> Tuple[Dict[str, str], Tuple[str, ...]]:
    """The options of an arm, and what its runs need.

    Args:
        opts: of the study, with what the arm changes.
    """
    own = dict(opts)
    if is_plain(arm):
        own["MODEL.META_ARCHITECTURE"] = cfg.MODEL.DISTILLER.STUDENT
        return own, teacher.needs if arm in TIMED else ()  # to time the arm that it teaches
    if arm in factors:
        own[KEY] = str(factors[arm])
    needs: Tuple[str, ...] = ()
    if needs_teacher(study_config(config_file, own)):
        if not teacher.given:
            raise UserError(
                f"no teacher for {arm}: give --teacher CONFIG, or MODEL.DISTILLER.TEACHER.WEIGHTS"
            )
        if teacher.weights:
            own["MODEL.DISTILLER.TEACHER.WEIGHTS"] = teacher.weights
        needs = teacher.needs
    if method_of(arm):
        try:
            check_distiller(study_config(config_file, own))  # now with the teacher
        except UserError as error:
            raise UserError(f"{arm}: {error}") from error
    return own, needs


def _data_options(opts: Mapping[str, str]) -> Dict[str, str]:
    """Of the study's options the teacher takes those that say what the data is, and the device."""
    kept = ("DATASETS.", "INPUT.", "MODEL.DEVICE")
    own = ("TRAIN_LIMIT", "UNLABELED_IMAGES")  # of the students
    return {k: v for k, v in opts.items() if k.startswith(kept) and not k.endswith(own)}
