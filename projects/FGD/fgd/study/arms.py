"""The arms of a study: what each changes in the distillation config, and the runs that follow."""

from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

from detectron2.config import CfgNode

from ..config import load_config
from ..distillation.config import needs_teacher
from ..errors import UserError
from ..methods.method import chosen_methods, weight_key

TEACHER, STUDENT, LONG = "teacher", "student", "student-long"

# All else is the same, the schedule above all; LONG's own is in `budget`.
ARMS: Dict[str, Dict[str, str]] = {
    STUDENT: {},  # plain; filled in with the student's meta-architecture
    "inherit": {"MODEL.DISTILLER.METHOD": "", "MODEL.DISTILLER.INHERIT": "True"},
    "distil": {"MODEL.DISTILLER.INHERIT": "False"},
    "inherit+distil": {"MODEL.DISTILLER.INHERIT": "True"},
    LONG: {},
}


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


def ablations(cfg: CfgNode) -> Dict[str, Dict[str, str]]:
    """Arms that switch off one term of the config's method, no-TERM, or all but one, only-TERM.

    Whether they inherit is left to the config. Terms whose weight is 0 already are none of them,
    and one term alone has none.
    """
    keys = {
        term: f"MODEL.DISTILLER.{method.__name__.upper()}.{weight_key(term)}"
        for method in chosen_methods(cfg)
        for term in method.terms
        if method.node(cfg)[weight_key(term)]
    }
    if len(keys) < 2:
        return {}
    return {
        **{f"no-{term}": {key: "0.0"} for term, key in keys.items()},
        **{
            f"only-{term}": {key: "0.0" for other, key in keys.items() if other != term}
            for term in keys
        },
    }


def is_ablation(arm: str) -> bool:
    return arm.startswith(("no-", "only-"))


def check_arms(arms: Sequence[str], cfg: CfgNode) -> None:
    """Refuse arms that cannot be run.

    Raises:
        UserError: an unknown arm; one twice; `LONG` without the two arms whose time it needs.
    """
    known = [*ARMS, *ablations(cfg)]
    unknown = [arm for arm in arms if arm not in known]
    if unknown:
        raise UserError(f"--arms: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    if len(set(arms)) < len(arms):
        raise UserError(f"--arms: {','.join(arms)} names an arm twice")
    main = main_arm(cfg)
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
            and evaluated to know the gap that a student can close. A network of timm detects
            nothing: it is not evaluated, and no gap is known. Methods without a teacher need none.
    Raises:
        UserError: see `check_arms`; or there is no teacher, and an arm needs one; or one of timm
            cannot be it.
    """
    cfg = study_config(config_file, opts)
    check_arms(arms, cfg)
    timm = cfg.MODEL.DISTILLER.TEACHER.TIMM
    if timm:
        _check_timm_teacher(timm, teacher, arms)
    weights = str(cfg.MODEL.DISTILLER.TEACHER.WEIGHTS)
    folder = output / TEACHER
    changes = {**ARMS, **ablations(cfg)}
    taught = [arm for arm in arms if _is_taught(arm, cfg, changes[arm])]
    runs: List[Run] = []
    if teacher:
        weights = str(folder / "model_final.pth")
        runs.append(Run(TEACHER, 0, teacher, folder, _data_options(opts)))
    elif weights and not timm:
        config = str(folder / "evaluated.yaml")  # written when the run starts
        runs.append(Run(TEACHER, 0, config, folder, {"MODEL.WEIGHTS": weights}, eval_only=True))
    elif taught and not timm:
        raise UserError(
            f"no teacher for {', '.join(taught)}: give --teacher CONFIG, or "
            "MODEL.DISTILLER.TEACHER.WEIGHTS"
        )
    for seed in seeds:
        for arm in arms:
            own, needs = {**opts, **changes[arm]}, ()
            if arm in (STUDENT, LONG):
                own["MODEL.META_ARCHITECTURE"] = cfg.MODEL.DISTILLER.STUDENT
                needs = (STUDENT, main_arm(cfg)) if arm == LONG else ()
            elif arm in taught:
                own["MODEL.DISTILLER.TEACHER.WEIGHTS"] = weights
                needs = (TEACHER,) if teacher else ()
            runs.append(Run(arm, seed, config_file, output / f"{arm}_{seed}", own, needs))
    order = {TEACHER: 0, STUDENT: 1, LONG: 3}
    return sorted(runs, key=lambda run: order.get(run.arm, 2))


def _is_taught(arm: str, cfg: CfgNode, changes: Dict[str, str]) -> bool:
    """Whether an arm needs a teacher."""
    if arm in (STUDENT, LONG):
        return False
    own = cfg.clone()
    own.defrost()
    own.merge_from_list([word for pair in changes.items() for word in pair])
    return needs_teacher(own)


def _check_timm_teacher(timm: str, teacher: str, arms: Sequence[str]) -> None:
    key = f"MODEL.DISTILLER.TEACHER.TIMM {timm}"
    if teacher:
        raise UserError(f"--teacher {teacher} and {key} are two teachers; leave one out")
    inheriting = [arm for arm in arms if arm.startswith("inherit")]
    if inheriting:
        raise UserError(
            f"--arms: {', '.join(inheriting)}: {key} has no neck and no head to inherit; take "
            "student,distil"
        )


def _data_options(opts: Dict[str, str]) -> Dict[str, str]:
    """Of the study's options the teacher takes those that say what the data is, and the device."""
    kept = ("DATASETS.", "INPUT.", "MODEL.DEVICE")
    return {k: v for k, v in opts.items() if k.startswith(kept) and "TRAIN_LIMIT" not in k}
