"""Several teachers in a row (MTPD, ICML 2023, arXiv 2308.09105): a chain of distillations.

Each stage is a distillation config with its own teacher, the one closest to the student first. The
first starts as its config says; every further one from the student of the stage before, with new
method modules, optimizer and schedule, and never inheriting, which would overwrite that student.
The arm `single-long` is the fair comparison: the last stage's teacher alone, for all iterations.
"""

from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from detectron2.config import CfgNode

from ..config import META_ARCHITECTURE, student_config
from ..distillation.config import check_distiller, needs_teacher, teacher_name
from ..engine.config_change import differences
from ..engine.evaluation import check_same_ap
from ..engine.results import RESULTS
from ..errors import UserError
from .arms import SINGLE, STAGES, study_config
from .budget import stretched
from .files import START, is_finished, read_result, read_start
from .run import Run, Teacher

_INHERIT = "MODEL.DISTILLER.INHERIT"
_WEIGHTS, _CONFIG = "MODEL.DISTILLER.TEACHER.WEIGHTS", "MODEL.DISTILLER.TEACHER.CONFIG_FILE"
_SAME = ("MODEL.", "DATASETS.", "INPUT.")  # in all stages as in the study's config


class Stage(NamedTuple):
    """One distillation of a chain.

    Attributes:
        opts: of its run, but for what makes that start from the stage before.
        cfg: with these.
        needs: of the study's teacher, if that is the stage's too.
    """

    number: int
    config_file: str
    opts: Dict[str, str]
    cfg: CfgNode
    needs: Tuple[str, ...]


def read_stages(
    files: Sequence[str], cfg: CfgNode, opts: Mapping[str, str], teacher: Teacher
) -> List[Stage]:
    """The stages of --stages.

    Args:
        cfg: the study's.
        opts: the study's; which teacher they name is not a stage's.
        teacher: the study's, for stages that name none.
    Raises:
        UserError: fewer than two; or one that is no distillation of the study's student.
    """
    if len(files) < 2:
        raise UserError(f"--stages: {files[0]} alone is no chain; name two configs or more")
    stages = []
    for number, file in enumerate(files, 1):
        try:
            stages.append(_read_stage(number, file, cfg, opts, teacher))
        except UserError as error:
            raise UserError(f"--stages, stage {number}, {file}: {error}") from error
    return stages


def _read_stage(
    number: int, file: str, cfg: CfgNode, opts: Mapping[str, str], teacher: Teacher
) -> Stage:
    own = {key: value for key, value in opts.items() if key not in (_WEIGHTS, _CONFIG)}
    stage, needs = study_config(file, own), ()
    if stage.MODEL.META_ARCHITECTURE != META_ARCHITECTURE:
        raise UserError(f"MODEL.META_ARCHITECTURE is not {META_ARCHITECTURE}")
    node = stage.MODEL.DISTILLER.TEACHER
    if needs_teacher(stage) and not teacher_name(stage):
        if not teacher.weights:
            raise UserError(f"{_WEIGHTS} is empty, and the study has no teacher")
        own[_WEIGHTS], needs = teacher.weights, teacher.needs
        own[_CONFIG] = node.CONFIG_FILE or cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE
        stage = study_config(file, own)
    trained = stage.clone()
    trained.MODEL.DISTILLER.INHERIT = stage.MODEL.DISTILLER.INHERIT and number == 1
    check_distiller(trained)
    found = _other_student(cfg, stage)
    if number > 1:
        found.pop("MODEL.WEIGHTS", None)  # it starts from the stage before
    if found:
        raise UserError(f"its student or data are not the study's ({'; '.join(found.values())})")
    return Stage(number, file, own, stage, needs)


def _other_student(cfg: CfgNode, stage: CfgNode) -> Dict[str, str]:
    found = differences(student_config(cfg).dump(), student_config(stage).dump())
    return {key: text for key, text in found.items() if key.startswith(_SAME)}


def not_inheriting(stages: Sequence[Stage]) -> List[str]:
    """A sentence for each later stage whose config would inherit."""
    return [
        f"Stage {stage.number}: {_INHERIT} True of {stage.config_file} is off, because it would "
        f"overwrite the student of stage {stage.number - 1}."
        for stage in stages[1:]
        if stage.cfg.MODEL.DISTILLER.INHERIT
    ]


def _arm(stage: Stage, stages: Sequence[Stage]) -> str:
    return STAGES if stage is stages[-1] else f"stage {stage.number}"


def chain(stages: Sequence[Stage], seed: int, output: Path) -> List[Run]:
    """The runs of one seed; the last is that of the arm `stages`, and has the others before it."""
    before: Tuple[Run, ...] = ()
    for stage in stages:
        own, needs = dict(stage.opts), stage.needs
        if before:
            start = str(before[-1].folder / "model_final.pth")
            own |= {"MODEL.WEIGHTS": start, _INHERIT: "False"}
            needs = (str(before[-1]), *needs)
        folder = output / f"{STAGES}_{seed}" / f"stage{stage.number}"
        arm = _arm(stage, stages)
        run = Run(arm, seed, stage.config_file, folder, own, needs, before=before)
        before = run.chain
    return list(before)


def single(stages: Sequence[Stage], seed: int, output: Path) -> Run:
    """The last stage's teacher alone, for the iterations of all stages, its schedules stretched."""
    last = stages[-1]
    iterations = sum(stage.cfg.SOLVER.MAX_ITER for stage in stages)
    own = {**last.opts, **stretched(last.cfg, iterations)}
    for name in ("START", "STOP", "WARMUP_ITERS"):
        value = last.cfg.MODEL.DISTILLER.SCHEDULE[name] * iterations / last.cfg.SOLVER.MAX_ITER
        own[f"MODEL.DISTILLER.SCHEDULE.{name}"] = str(round(value))
    return Run(SINGLE, seed, last.config_file, output / f"{SINGLE}_{seed}", own, last.needs)


def wrong_starts(runs: Sequence[Run]) -> List[str]:
    """Sentences on finished stages that did not start from the stage before as it is now."""
    found = []
    for run in runs:
        if not (run.before and is_finished(run) and is_finished(run.before[-1])):
            continue
        start = read_start(run)
        try:
            if start is None:
                raise UserError(f"{run.folder / START} is missing")
            check_same_ap(start, str(run.before[-1].folder / RESULTS))
        except UserError as error:
            found.append(f"{run} did not go on from {run.before[-1]} as it is now: {error}")
    return found


def stage_rows(runs: Sequence[Run], stages: Sequence[Stage]) -> List[dict]:
    """What the page says of each stage.

    Returns:
        {"stage", "config", "method", "teacher", "iterations", "start", "end"}; the last two are
        results of each seed that has finished the stage, ``start`` None where nothing was
        evaluated, as at the first stage.
    """
    rows = []
    for stage in stages:
        arm, node = _arm(stage, stages), stage.cfg.MODEL.DISTILLER
        done = [run for run in runs if run.arm == arm and is_finished(run)]
        row: Dict[str, Any] = {"stage": stage.number, "config": stage.config_file}
        row |= {"method": node.METHOD, "teacher": teacher_name(stage.cfg)}
        row |= {"iterations": stage.cfg.SOLVER.MAX_ITER}
        row |= {"start": [*map(read_start, done)], "end": [*map(read_result, done)]}
        rows.append(row)
    return rows
