"""A study goes on with the runs that are there, if they are what is asked for now."""

from typing import Dict, Sequence

from detectron2.config import CfgNode

from ..config import load_config, load_config_text
from ..errors import UserError
from .arms import LONG
from .factors import KEY
from .files import is_finished, was_given_factor
from .run import Run

# What leaves the results of a run as they are, and names of places: a study and its data may be
# moved. Other test data is found out when detections are compared with results (`summary`).
_HARMLESS = (
    "OUTPUT_DIR",
    "MODEL.DISTILLER.TEACHER.WEIGHTS",
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "DATASETS.JSON.TRAIN",
    "DATASETS.JSON.TEST",
    "DATASETS.JSON.TRAIN_IMAGES",
    "DATASETS.JSON.TEST_IMAGES",
    "DATASETS.SHAPES.ROOT",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.KEEP_CHECKPOINTS",
    "VIS_PERIOD",
)


def check_finished(runs: Sequence[Run]) -> None:
    """Raise UserError if a run that is there already had another config than is now asked for.

    Also if one that measures its factor now was given it then: its page would say otherwise.
    """
    for run in runs:
        if run.balance and was_given_factor(run):
            raise UserError(
                f"{run}: begun in {run.folder} with a given {KEY}, and now it is to be measured; "
                "give it again (--factor), use another --output, or delete that folder"
            )
        stored = run.folder / "config.yaml"
        if run.eval_only or not is_finished(run) or not stored.exists():
            continue
        options = {"SEED": str(run.seed), **run.opts}
        now = load_config(run.config_file, [word for pair in options.items() for word in pair])
        now = load_config_text(
            now.dump(), run.config_file
        )  # a tuple inside a tuple turns to a list
        changes = differences(load_config(str(stored)), now)
        if run.arm == LONG:  # its schedule is in the study's own file
            changes = {k: v for k, v in changes.items() if not k.startswith("SOLVER.")}
        if run.balance:  # it has what was measured then
            changes.pop(KEY, None)
        if run.before:  # the study may have been moved; `stages` checks what it starts from
            changes.pop("MODEL.WEIGHTS", None)
        if changes:
            raise UserError(
                f"{run}: finished in {run.folder} with another config "
                f"({'; '.join(changes.values())}); use another --output, or delete that folder"
            )


def differences(
    before: CfgNode, now: CfgNode, prefix: str = "", harmless: Sequence[str] = _HARMLESS
) -> Dict[str, str]:
    """Keys of both that bear on results and differ, as "KEY: before -> now"."""
    found: Dict[str, str] = {}
    for key in now.keys() & before.keys():
        name, old, new = prefix + key, before[key], now[key]
        if isinstance(new, CfgNode) and isinstance(old, CfgNode):
            found.update(differences(old, new, f"{name}.", harmless))
        elif old != new and name not in harmless:
            found[name] = f"{name}: {old} -> {new}"
    return dict(sorted(found.items()))
