"""What one process does and all have to know."""

from typing import Callable, TypeVar

from detectron2.utils import comm

from ..errors import UserError

T = TypeVar("T")


def on_main_process(action: Callable[[], T]) -> T:
    """Run ``action`` in the main process while the others wait; all get what it returns.

    Raises:
        UserError: in every process, if ``action`` raised one. A main process that failed alone
            would leave the others waiting for it at their next exchange.
    """
    result, error = None, None
    if comm.is_main_process():
        try:
            result = action()
        except UserError as caught:
            error = caught
    message = None if error is None else str(error)
    result, message = comm.all_gather((result, message))[0]
    if message is not None:
        raise (error or UserError(message))
    return result
