"""One run of a study."""

from pathlib import Path
from typing import Dict, NamedTuple, Sequence, Set, Tuple

from ..engine.results import BEST, FINAL
from .arms import TEACHER


class Run(NamedTuple):
    """One training: an arm with a seed, in a folder of its own.

    Attributes:
        needs: arms whose runs come first, and names of runs without which this one cannot start.
        eval_only: of a teacher that is there already.
        balance: measures MODEL.DISTILLER.FACTOR at its start.
        before: the runs of a chain that come before this one, which starts from the last of them.
        select: it is reported by its best checkpoint, not by its last one.
        tested: digests of the test data that its results have to be of; {} = not known.
    """

    arm: str
    seed: int
    config_file: str
    folder: Path
    opts: Dict[str, str]
    needs: Tuple[str, ...] = ()
    eval_only: bool = False
    balance: bool = False
    before: Tuple["Run", ...] = ()
    tested: Dict[str, str] = {}
    select: bool = False

    def __str__(self) -> str:
        return self.arm if self.arm == TEACHER else f"{self.arm}, seed {self.seed}"

    @property
    def trained(self) -> "Run":
        """The training alone, whose results are of its last checkpoint."""
        return self._replace(select=False)

    @property
    def reported(self) -> Path:
        """The folder that has its results."""
        return self.folder / "best" if self.select else self.folder

    @property
    def weights(self) -> str:
        """The checkpoint that its results are of."""
        if self.eval_only:
            return self.opts["MODEL.WEIGHTS"]
        return str(self.folder / (BEST if self.select else FINAL))

    @property
    def chain(self) -> Tuple["Run", ...]:
        """All trainings that made its student."""
        return (*self.before, self)


class Teacher(NamedTuple):
    """The study's teacher.

    Attributes:
        given: whether there is one. weights: its checkpoint; "" of a network of timm.
        needs: arms whose runs come first. runs: its own.
    """

    given: bool = False
    weights: str = ""
    needs: Tuple[str, ...] = ()
    runs: Tuple[Run, ...] = ()


def parts(runs: Sequence[Run]) -> Set[str]:
    """Arms that are no more than the way to another."""
    return {earlier.arm for run in runs for earlier in run.before}
