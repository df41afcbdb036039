"""Samples of the training stream: each a function of its place in it, whichever worker asks."""

from typing import Callable, Iterator, List, Optional, Sequence, Tuple

from detectron2.utils import comm
from torch.utils.data import Dataset

from ..processes import rng
from .images import BadImage
from .unlabeled import MARK

SampleKey = Tuple[int, int]  # index in the dataset, position in this rank's stream of samples
Mapper = Callable[[dict], dict]  # a dataset dict to a training sample


class SeededSamples(Dataset):
    """Maps a `SampleKey` and an iteration to a training sample.

    It is augmented from (seed, rank, position), by the mapper that the iteration has. Behind the
    images with labels come those without, if there are any, with numbers and a mapper of their own.

    In the place of a bad image comes the next good one of its group, whichever worker asks and
    whenever: the stream stays a function of the seed. The sample then has "skipped", the reasons.
    """

    def __init__(
        self,
        dicts: Sequence[dict],
        mapper_of: Callable[[int], Mapper],
        seed: int,
        groups: Sequence[int],
        most: int,
        labeled: int,
        unlabeled_mapper: Optional[Mapper],
    ):
        self.labeled, self.unlabeled_mapper = labeled, unlabeled_mapper
        self.dicts, self.mapper_of, self.seed = dicts, mapper_of, seed
        self.groups, self.most_bad = groups, most
        self.rank = comm.get_rank()

    def __getitem__(self, wanted: Tuple[SampleKey, int]) -> dict:
        (index, position), iteration = wanted
        known = index < self.labeled
        mapper = self.mapper_of(iteration) if known else self.unlabeled_mapper
        key = (self.seed, self.rank, position, *(() if known else (1,)))
        skipped: List[str] = []
        for candidate in self._candidates(index):
            try:
                with rng.seeded(*key):
                    sample = mapper(self.dicts[candidate])
            except BadImage as error:
                skipped.append(str(error))
                if len(skipped) > self.most_bad:
                    raise
                continue
            sample = sample if known else {**sample, MARK: True}
            return {**sample, "skipped": skipped} if skipped else sample
        raise BadImage(f"no image of its orientation can be used; {skipped[0]}")

    def _candidates(self, index: int) -> Iterator[int]:
        for step in range(len(self.groups)):
            candidate = (index + step) % len(self.groups)
            if self.groups[candidate] == self.groups[index]:
                yield candidate
