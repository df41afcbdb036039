"""metrics.json of a run that was stopped: the same lines as if it had not been."""

import json
import logging
import os
from typing import Collection, List

from detectron2.engine import HookBase, hooks

# Wall-clock times differ from run to run, which a checkpoint must not.
CLOCKS = ("time", "data_time", "rank_data_time", "eta_seconds")
_WINDOW = 20  # of Detectron2's writers: they log the median of so many values

logger = logging.getLogger(__name__)


def repair_metrics(path: str, last: int) -> List[int]:
    """Leave the complete lines up to iteration ``last``; a resumed run writes the others again.

    Args:
        path: a metrics.json, which need not be there.
        last: iteration of the checkpoint; -1 = none, so that nothing is left.
    Returns:
        The iterations that have a line.
    """
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    kept = [line for line in lines if -1 < _iteration(line) <= last]
    if len(kept) < len(lines):
        logger.info(
            f"{path}: removed {len(lines) - len(kept)} lines, incomplete or of iterations after "
            f"{last}, which are trained again"
        )
        # In place, because Detectron2's writer has the file open by now. What a kill in here could
        # leave, the next repair takes out.
        with open(path, "r+b") as file:
            file.writelines(kept)
            file.truncate()
    return [_iteration(line) for line in kept]


def _iteration(line: bytes) -> int:
    """-1 for a line that was cut off, or that is none of Detectron2's."""
    try:
        return int(json.loads(line)["iteration"]) if line.endswith(b"\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1


class ContinueMetrics(HookBase):
    """Makes a resumed run's metrics.json that of an uninterrupted one, times apart.

    The logged values are medians over the last iterations, so the checkpoint holds these. And it
    is saved in the middle of what follows a step, before evaluation and writing: where a kill has
    lost these, they are done before the next step. Comes last among the hooks.
    """

    def __init__(self):
        self.saved: dict = {}
        self.written: Collection[int] = ()  # iterations that have lines; to be set when resuming

    def state_dict(self) -> dict:
        storage = getattr(self.trainer, "storage", None)
        if storage is None:  # nothing was trained since it was loaded
            return self.saved
        state: dict = {"smoothed": {}, "single": {}}
        for name, smoothed in storage.smoothing_hints().items():
            values = storage.history(name).values()
            if name in CLOCKS:
                continue
            if smoothed:
                state["smoothed"][name] = [list(pair) for pair in values[-_WINDOW:]]
            elif values[-1][1] > self._last_write():
                state["single"][name] = [list(values[-1])]
        return state

    def _last_write(self) -> int:
        """The iteration before this one after which the writers wrote; -1 = they have not yet."""
        periods = [x._period for x in self.trainer._hooks if isinstance(x, hooks.PeriodicWriter)]
        return self.trainer.iter // periods[0] * periods[0] - 1 if periods else -1

    def load_state_dict(self, state_dict: dict) -> None:
        self.saved = state_dict

    def before_train(self):
        storage, last = self.trainer.storage, self.trainer.iter - 1
        written = max(self.written, default=-1)
        for kind, scalars in self.saved.items():
            for name, values in scalars.items():
                for value, storage.iter in values:
                    storage.put_scalar(name, value, smoothing_hint=kind == "smoothed")
                if storage.iter <= written:
                    storage.latest().pop(name)  # written, or by then there was a newer one
        storage.iter = self.trainer.iter
        if self.saved and last not in self.written:
            self._catch_up(last)

    def _catch_up(self, last: int) -> None:
        self.trainer.iter = self.trainer.storage.iter = last
        for hook in self.trainer._hooks:
            if isinstance(hook, (hooks.EvalHook, hooks.PeriodicWriter)):
                hook.after_step()
        self.trainer.iter = self.trainer.storage.iter = last + 1
