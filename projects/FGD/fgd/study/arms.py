"""The arms of a study: their names, and what each changes in the distillation config."""

from typing import Dict, List, Optional, Sequence

from detectron2.config import CfgNode

from ..config import META_ARCHITECTURE, load_config
from ..distillation.config import asked_for
from ..errors import UserError
from ..methods.method import METHOD_REGISTRY, chosen_methods, weight_key
from .labels import BOTH, PSEUDO, UNLABELED, check_unlabeled_arm

TEACHER, STUDENT, LONG = "teacher", "student", "student-long"
STAGES, SINGLE = "stages", "single-long"  # several teachers in a row; see `stages`
REFERENCE = "FGD"  # the method that others are compared with
_INHERIT = "inherit+"
# Arm → the arm that it is, for as long as the main arm takes (`budget`).
TIMED = {LONG: STUDENT, **{f"{arm}-timed": arm for arm in (PSEUDO, BOTH, UNLABELED)}}

# All else is the same, the schedule above all; that of `TIMED` is in `budget`.
ARMS: Dict[str, Dict[str, str]] = {
    STUDENT: {},  # plain; filled in with the student's meta-architecture
    "inherit": {"MODEL.DISTILLER.METHOD": "", "MODEL.DISTILLER.INHERIT": "True"},
    "distil": {"MODEL.DISTILLER.INHERIT": "False"},
    "inherit+distil": {"MODEL.DISTILLER.INHERIT": "True"},
    PSEUDO: {},  # these three are the student or the main arm, on other pictures; see `labels`
    BOTH: {},
    UNLABELED: {},
    **{arm: {} for arm in TIMED},
}


def base_arm(arm: str) -> str:
    """The arm that one of `TIMED` is but for its iterations; of others itself."""
    return TIMED.get(arm, arm)


def is_plain(arm: str) -> bool:
    """Whether it is without distillation."""
    return base_arm(arm) in (STUDENT, PSEUDO)


def has_labels(arm: str) -> bool:
    """Whether it is trained on the file of --labels."""
    return base_arm(arm) in (PSEUDO, BOTH)


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


def method_of(arm: str) -> str:
    """MODEL.DISTILLER.METHOD of an arm that names it, METHOD or inherit+METHOD; "" of others."""
    method = arm.removeprefix(_INHERIT)
    known = all(name in METHOD_REGISTRY for name in method.split("+"))
    return method if known and arm not in ARMS else ""


def method_arms(arms: Sequence[str]) -> List[str]:
    """Those that name a method."""
    return [arm for arm in arms if method_of(arm)]


def main_arms(arms: Sequence[str], cfg: CfgNode) -> List[str]:
    """The arms that a study is about: the config as it stands, or without it those of methods."""
    main = main_arm(cfg)
    return [main] if main in arms else method_arms(arms)


def reference_arm(arm: str, arms: Sequence[str], cfg: CfgNode) -> Optional[str]:
    """The arm of `REFERENCE` to compare another method's with; None if there is none.

    One that inherits if the arm does, and otherwise not, if the study has it.
    """
    methods = {name: method_of(name) for name in arms}
    for name in ("distil", "inherit+distil"):  # they count where no arm names the method
        if name in arms:
            methods[name] = cfg.MODEL.DISTILLER.METHOD
    if methods.get(arm, "") in ("", REFERENCE):
        return None
    found = [name for name, method in methods.items() if method == REFERENCE]
    same = [x for x in found if x.startswith(_INHERIT) == arm.startswith(_INHERIT)]
    return min(same or found, key=lambda name: not method_of(name), default=None)


def ablations(cfg: CfgNode) -> Dict[str, Dict[str, str]]:
    """Arms that switch off one term of the config's method, no-TERM, or all but one, only-TERM.

    TERM is METHOD.TERM where two methods of a sum have one of that name. Whether they inherit is
    left to the config. Terms whose weight is 0 already are none of them,
    and one term alone has none.
    """
    chosen = chosen_methods(cfg)
    terms = [term for method in chosen for term in method.terms]
    keys = {
        term if terms.count(term) == 1 else f"{method.__name__}.{term}": (
            f"MODEL.DISTILLER.{method.__name__.upper()}.{weight_key(term)}"
        )
        for method in chosen
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


def changes_of(arm: str, cfg: CfgNode) -> Dict[str, str]:
    """The options in which a known arm differs from the config."""
    method = method_of(arm)
    if method:
        inherit = str(arm.startswith(_INHERIT))
        return {"MODEL.DISTILLER.METHOD": method, "MODEL.DISTILLER.INHERIT": inherit}
    return {**ARMS, **ablations(cfg)}[arm]


def check_arms(arms: Sequence[str], cfg: CfgNode) -> None:
    """Refuse arms that cannot be run.

    Raises:
        UserError: the config distils nothing; an unknown arm; one twice; inheriting for a method
            without a teacher; one of `TIMED` without the arms whose time it needs.
    """
    found = cfg.MODEL.META_ARCHITECTURE
    if found != META_ARCHITECTURE:
        raise UserError(
            f"MODEL.META_ARCHITECTURE: {found}, but a study needs the config of a distilled "
            f"student, {META_ARCHITECTURE}"
        )
    known = [*ARMS, STAGES, SINGLE, *ablations(cfg)]
    unknown = [arm for arm in arms if arm not in known and not method_of(arm)]
    if unknown:
        methods = ", ".join(name for name, _ in METHOD_REGISTRY)
        raise UserError(
            f"--arms: {', '.join(unknown)} unknown; there are {', '.join(known)}, and METHOD and "
            f"inherit+METHOD for each of {methods} and their sums, such as A+B"
        )
    if len(set(arms)) < len(arms):
        raise UserError(f"--arms: {','.join(arms)} names an arm twice")
    check_unlabeled_arm(arms, cfg)
    for arm in method_arms(arms):
        _check_inheriting(arm, cfg)
    for arm in (arm for arm in arms if arm in TIMED):
        _check_timed(arm, arms, cfg)


def _check_timed(arm: str, arms: Sequence[str], cfg: CfgNode) -> None:
    timed = main_arms(arms, cfg)
    missing = [name for name in dict.fromkeys((STUDENT, base_arm(arm))) if name not in arms]
    missing += [main_arm(cfg)] * (not timed)
    if missing:
        whose = ", ".join(timed) or f"{main_arm(cfg)}, or an arm of a method,"
        raise UserError(
            f"--arms: {arm} trains for the time that {whose} takes, so add {' and '.join(missing)}"
        )


def _check_inheriting(arm: str, cfg: CfgNode) -> None:
    cfg, method = cfg.clone(), method_of(arm)
    cfg.MODEL.DISTILLER.METHOD = method
    if arm.startswith(_INHERIT) and "teacher" not in asked_for(cfg):
        raise UserError(
            f"--arms: {arm}: {method} has no teacher to inherit from; the arm {method} is all of it"
        )
