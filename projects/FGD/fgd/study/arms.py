"""The arms of a study: what each changes in the distillation config, and the runs that follow."""

from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

from detectron2.config import CfgNode

from ..config import load_config
from ..errors import UserError

TEACHER, STUDENT, LONG = "teacher", "student", "student-long"
_FGD = "MODEL.DISTILLER.FGD."
TERMS = ("foreground", "background", "attention", "relation")

# All else is the same, the schedule above all; LONG's own is in `budget`.
ARMS: Dict[str, Dict[str, str]] = {
    STUDENT: {},  # plain; filled in with the student's meta-architecture
    "inherit": {"MODEL.DISTILLER.METHOD": "", "MODEL.DISTILLER.INHERIT": "True"},
    "distil": {"MODEL.DISTILLER.INHERIT": "False"},
    "inherit+distil": {"MODEL.DISTILLER.INHERIT": "True"},
    LONG: {},
    # Ablations of FGD; whether they inherit is left to the config.
    **{f"no-{term}": {f"{_FGD}{term.upper()}_WEIGHT": "0.0"} for term in TERMS},
    **{
        f"only-{term}": {f"{_FGD}{t.upper()}_WEIGHT": "0.0" for t in TERMS if t != term}
        for term in TERMS
    },
}
ABLATIONS = tuple(arm for arm in ARMS if arm.startswith(("no-", "only-")))


class Run(NamedTuple):
    """One training: an arm with a seed, in a folder of its own."""

    arm: str
    seed: int
    config_file: str
    folder: Path
    opts: Dict[str, str]
    needs: Tuple[str, ...] = ()  # arms whose runs come first
    eval_only: bool = False  # of a teacher that is there already

    def __str__(self) -> str:
        return self.arm if self.arm == TEACHER else f"{self.arm}, seed {self.seed}"


def study_config(config_file: str, opts: Dict[str, str]) -> CfgNode:
    """The config of the distilled student, with the options of every run.

    Raises:
        UserError: as `load_config`; or it has several test sets, whose results cannot be one table.
    """
    cfg = load_config(config_file, [word for pair in opts.items() for word in pair])
    if len(cfg.DATASETS.TEST) > 1 and not cfg.DATASETS.JSON.TEST:
        raise UserError(f"DATASETS.TEST: a study needs one test set, found {cfg.DATASETS.TEST}")
    return cfg


def main_arm(cfg: CfgNode) -> str:
    """The arm that is the config as it stands."""
    return "inherit+distil" if cfg.MODEL.DISTILLER.INHERIT else "distil"


def check_arms(arms: Sequence[str], cfg: CfgNode) -> None:
    """Refuse arms that cannot be run.

    Raises:
        UserError: an unknown arm; one twice; an ablation of another method than FGD; `LONG` without
            the two arms whose time it needs.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError(f"--arms: {', '.join(unknown)} unknown; there are {', '.join(ARMS)}")
    if len(set(arms)) < len(arms):
        raise UserError(f"--arms: {','.join(arms)} names an arm twice")
    method, main = cfg.MODEL.DISTILLER.METHOD, main_arm(cfg)
    ablations = [arm for arm in arms if arm in ABLATIONS]
    if ablations and method != "FGD":
        raise UserError(
            f"--arms: {', '.join(ablations)} switch terms of FGD, but MODEL.DISTILLER.METHOD is "
            f"{method!r}"
        )
    missing = [arm for arm in (STUDENT, main) if LONG in arms and arm not in arms]
    if missing:
        raise UserError(
            f"--arms: {LONG} trains for the time that {main} takes, so add {' and '.join(missing)}"
        )


def plan(
    config_file: str, teacher: str, arms: Sequence[str], seeds: Sequence[int], output: Path, opts
) -> List[Run]:
    """The runs of a study, in the order in which they are best started.

    Args:
        teacher: config of a teacher to train first; "" = MODEL.DISTILLER.TEACHER.WEIGHTS is used,
            and evaluated to know the gap that a student can close.
    Raises:
        UserError: see `check_arms`; or there is no teacher.
    """
    cfg = study_config(config_file, opts)
    check_arms(arms, cfg)
    weights = str(cfg.MODEL.DISTILLER.TEACHER.WEIGHTS)
    folder = output / TEACHER
    runs: List[Run] = []
    if teacher:
        weights = str(folder / "model_final.pth")
        runs.append(Run(TEACHER, 0, teacher, folder, _data_options(opts)))
    elif weights:
        config = str(folder / "evaluated.yaml")  # written when the run starts
        runs.append(Run(TEACHER, 0, config, folder, {"MODEL.WEIGHTS": weights}, eval_only=True))
    elif set(arms) - {STUDENT}:
        raise UserError("no teacher: give --teacher CONFIG, or MODEL.DISTILLER.TEACHER.WEIGHTS")
    for seed in seeds:
        for arm in arms:
            own, needs = {**opts, **ARMS[arm]}, ()
            if arm in (STUDENT, LONG):
                own["MODEL.META_ARCHITECTURE"] = cfg.MODEL.DISTILLER.STUDENT
                needs = (STUDENT, main_arm(cfg)) if arm == LONG else ()
            else:
                own["MODEL.DISTILLER.TEACHER.WEIGHTS"] = weights
                needs = (TEACHER,) if teacher else ()
            runs.append(Run(arm, seed, config_file, output / f"{arm}_{seed}", own, needs))
    order = {TEACHER: 0, STUDENT: 1, LONG: 3}
    return sorted(runs, key=lambda run: order.get(run.arm, 2))


def _data_options(opts: Dict[str, str]) -> Dict[str, str]:
    """Of the study's options the teacher takes those that say what the data is, and the device."""
    kept = ("DATASETS.", "INPUT.", "MODEL.DEVICE")
    return {k: v for k, v in opts.items() if k.startswith(kept) and "TRAIN_LIMIT" not in k}
