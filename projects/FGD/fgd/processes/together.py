"""What one process does and all have to know; what all do and one may fail at.

Each exchange tells of errors, too, and every process takes part in it whatever has happened to it.
So an error of one process reaches the others at their next exchange, in whichever function that is,
and nobody waits for a process that has left.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar

from detectron2.utils import comm

from ..errors import UserError

T = TypeVar("T")
_SHOWN = 3  # differences in a message


class OtherProcessError(RuntimeError):
    """Another process met an error that no user can mend; it prints the traceback."""


def on_main_process(action: Callable[[], T]) -> T:
    """Run ``action`` in the main process while the others wait; all get what it returns.

    Raises:
        UserError: in every process, if ``action`` raised one. A main process that failed alone
            would leave the others waiting for it at their next exchange.
    """
    if not comm.is_main_process():
        return _exchange(None)[0]
    return _told(action)[0]


def on_every_process(action: Callable[[], T]) -> T:
    """Run ``action``, which may exchange things itself; in all processes or, after errors, in none.

    Raises:
        UserError: in every process, if ``action`` raised one in any.
        OtherProcessError: the same of other errors, in the processes that met none.
    """
    result: List[T] = []
    _told(lambda: result.append(action()))
    return result[0]


def check_alike(facts: Callable[[], Dict[str, Any]]) -> None:
    """Compare what must be the same in all processes, which may be on several machines.

    Args:
        facts: gives names of facts → what this process has. Not called where it is the only one.
    Raises:
        UserError: in every process: which process differs from the first one, and in what; or as
            ``facts``.
    """
    if comm.get_world_size() == 1:
        return
    ranks = _told(lambda: {name: str(value) for name, value in facts().items()})
    for rank, other in enumerate(ranks):
        names = sorted(x for x in ranks[0].keys() | other.keys() if ranks[0].get(x) != other.get(x))
        if names:
            shown = [f"{x} is {other.get(x)} there, {ranks[0].get(x)} here" for x in names[:_SHOWN]]
            more = f"; {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise UserError(
                f"process {rank} was started with something else than process 0: "
                f"{'; '.join(shown)}{more}. Start all with one config on the same data"
            )


def _told(action: Callable[[], Any]) -> list:
    """What ``action`` returned in each process. Its error is told first, unless all know of it."""
    try:
        result = action()
    except Exception as error:
        if not getattr(error, "told", False):
            _exchange(None, error)
        raise
    return _exchange(result)


def _exchange(own: Any, error: Optional[Exception] = None) -> list:
    """What every process has, by rank; raises an error of any other one, unless given one."""
    message: Optional[Tuple[bool, str]] = None
    if error is not None:
        error.told = True
        message = isinstance(error, UserError), f"{error}" or type(error).__name__
    everyone = comm.all_gather((own, message))
    for rank, (_, met) in enumerate(everyone):
        if met is not None and error is None:
            by_user, text = met
            other = UserError(text) if by_user else OtherProcessError(f"process {rank}: {text}")
            other.told = True
            raise other
    return [value for value, _ in everyone]
