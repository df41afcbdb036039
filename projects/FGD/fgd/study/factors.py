"""MODEL.DISTILLER.FACTOR of arms that name a method: measured for each run, unless it is given.

Terms of different methods differ by orders of magnitude, so one factor for all would compare the
scales of their losses. `train_net.py --balance` measures it at the start of a run.
"""

import math
from typing import Dict, Mapping, Sequence

from ..errors import UserError
from .arms import method_arms, method_of

KEY = "MODEL.DISTILLER.FACTOR"


def given_factors(text: str, arms: Sequence[str], opts: Mapping[str, str]) -> Dict[str, float]:
    """Arm → factor, of arms of methods that are not to measure one.

    Args:
        text: "PKD=0.5,inherit+MGD=1": a method, for all its arms, or an arm; the arm goes first.
        opts: the study's options; `KEY` among them holds for every run.
    Raises:
        UserError: not such a text; an unknown name; not a factor > 0; both ways at once.
    """
    named = _parse(text)
    known = [*method_arms(arms), *map(method_of, method_arms(arms))]
    unknown = [name for name in named if name not in known]
    if unknown:
        there = ", ".join(dict.fromkeys(known)) or "none"
        raise UserError(
            f"--factor: {', '.join(unknown)} is no arm of a method in --arms; there is {there}"
        )
    if named and KEY in opts:
        raise UserError(f"--factor: {KEY} {opts[KEY]} among the options holds for every arm")
    return {
        arm: named.get(arm, named.get(method_of(arm)))
        for arm in method_arms(arms)
        if arm in named or method_of(arm) in named
    }


def _parse(text: str) -> Dict[str, float]:
    named: Dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        try:
            factor = float(value)
        except ValueError:
            raise UserError(f"--factor: {part!r} is not NAME=NUMBER, such as PKD=0.5") from None
        if not 0 < factor < math.inf:
            raise UserError(f"--factor: {part}: a factor is a finite number > 0")
        if name in named:
            raise UserError(f"--factor: {name} is there twice")
        named[name] = factor
    return named


def is_measured(arm: str, given: Mapping[str, float], opts: Mapping[str, str]) -> bool:
    """Whether a run of this arm measures its factor."""
    return bool(method_of(arm)) and arm not in given and KEY not in opts
