"""The endless stream of training batches: a function of the seed and the iteration alone.

Detectron2's loader cannot be continued: a resumed run reads the same images from the start again,
and augmentation depends on how many workers there are. Here batches are planned from the dataset's
metadata, so a resumed run starts at any iteration without decoding an image, and each sample is
augmented from its own seed. The stream is bit-equal for any number of workers.
"""

import itertools
import logging
from collections import deque
from typing import Callable, Deque, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..processes import rng
from ..processes.together import on_main_process
from .images import BadImage, ImageMapper
from .second_images import with_second_images
from .workers import check_timeout, supervise, supervised_batches

logger = logging.getLogger(__name__)

SampleKey = Tuple[int, int]  # index in the dataset, position in this rank's stream of samples
Mapper = Callable[[dict], dict]  # a dataset dict to a training sample


def plan_batches(
    indices: Iterable[int], groups: Sequence[int], batch_size: int
) -> Iterator[List[SampleKey]]:
    """Batches of samples that belong to one group, each as soon as it is full.

    With ``groups`` 0 for wide images and 1 for others this is Detectron2's aspect ratio grouping,
    without reading any image.
    """
    waiting: dict[int, List[SampleKey]] = {}
    for position, index in enumerate(indices):
        batch = waiting.setdefault(groups[index], [])
        batch.append((index, position))
        if len(batch) == batch_size:
            yield waiting.pop(groups[index])


class _SeededSamples(Dataset):
    """Maps a `SampleKey` and an iteration to a training sample.

    It is augmented from (seed, rank, position), by the mapper that the iteration has.

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
    ):
        self.dicts, self.mapper_of, self.seed = dicts, mapper_of, seed
        self.groups, self.most_bad = groups, most
        self.rank = comm.get_rank()

    def __getitem__(self, key: Tuple[SampleKey, int]) -> dict:
        (index, position), iteration = key
        mapper = self.mapper_of(iteration)
        skipped: List[str] = []
        for candidate in self._candidates(index):
            try:
                with rng.seeded(self.seed, self.rank, position):
                    sample = mapper(self.dicts[candidate])
            except BadImage as error:
                skipped.append(str(error))
                if len(skipped) > self.most_bad:
                    raise
                continue
            return {**sample, "skipped": skipped} if skipped else sample
        raise BadImage(f"no image of its orientation can be used; {skipped[0]}")

    def _candidates(self, index: int) -> Iterator[int]:
        for step in range(len(self.groups)):
            candidate = (index + step) % len(self.groups)
            if self.groups[candidate] == self.groups[index]:
                yield candidate


class TrainStream:
    """Iterate to get this rank's batches, lists of Detectron2's training dicts, without end.

    Set ``start``, the training iteration that gets the first batch, or ``seed`` before a batch is
    drawn. Iterating raises BadImage when more than ``most_bad`` different images are bad, and
    UserError when workers need more than ``timeout`` seconds (0: any time) for a batch.

    ``later``: from this iteration on samples are made by this mapper instead.
    """

    def __init__(
        self,
        dicts: list,
        mapper: Mapper,
        make_sampler: Callable[[int], Iterable[int]],
        *,
        batch_size: int,
        seed: int,
        group_by_aspect_ratio: bool = True,
        num_workers: int = 0,
        most_bad: int = 0,
        timeout: float = 0,
        later: Optional[Tuple[int, Mapper]] = None,
    ):
        self.dicts, self.mapper, self.make_sampler = dicts, mapper, make_sampler
        self.later = later
        self.batch_size, self.num_workers = batch_size, num_workers
        self.timeout = check_timeout(timeout)
        self.groups = [0] * len(dicts)
        if group_by_aspect_ratio:
            self.groups = [0 if x["width"] > x["height"] else 1 for x in dicts]
        self.seed, self.start = seed, 0
        self.most_bad = most_bad
        self.bad_images: List[str] = []  # the reasons, each once
        self.last_images: List[str] = []  # of the batch drawn last

    def __iter__(self) -> Iterator[List[dict]]:
        # A generator: nothing below runs before the first batch is asked for, so a trainer that
        # makes its iterator early (v0.6) can still be resumed.
        ahead: Deque[List[SampleKey]] = deque()  # batches that the loader was told to read
        loader = DataLoader(
            # In one block of memory, which workers share.
            self._samples(DatasetFromList(self.dicts, copy=False)),
            batch_sampler=self._planned(ahead),
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            # Without one of its own, the loader draws from the global generator.
            generator=Generator(),
        )
        names = lambda: ", ".join(describe_image(self.dicts[i]) for i, _ in ahead[0])  # noqa: E731
        for batch in supervised_batches(supervise(loader, self.timeout), names):
            ahead.popleft()
            for sample in batch:
                self._count(sample.pop("skipped", ()))
            self.last_images = [describe_image(sample) for sample in batch]
            yield batch

    def _planned(self, ahead: Deque[List[SampleKey]]) -> Iterator[List[Tuple[SampleKey, int]]]:
        batches = plan_batches(self.make_sampler(self.seed), self.groups, self.batch_size)
        for iteration, batch in enumerate(batches):
            if iteration >= self.start:
                ahead.append(batch)
                yield [(key, iteration) for key in batch]

    def _samples(self, dicts: Sequence[dict]) -> _SeededSamples:
        return _SeededSamples(dicts, self._mapper_of, self.seed, self.groups, self.most_bad)

    def _mapper_of(self, iteration: int) -> Mapper:
        if self.later is not None and iteration >= self.later[0]:
            return self.later[1]
        return self.mapper

    def _count(self, reasons: Iterable[str]) -> None:
        for reason in set(reasons).difference(self.bad_images):
            self.bad_images.append(reason)
            count = len(self.bad_images)
            if count > self.most_bad:
                raise BadImage(
                    f"{count} images cannot be used, DATALOADER.MAX_BAD_IMAGES is "
                    f"{self.most_bad}; the last one: {reason}"
                )
            logger.warning(f"Skipped ({count} of at most {self.most_bad}): {reason}")

    def first_batches(self, count: int) -> List[List[dict]]:
        """The batches that iterations 0 to ``count - 1`` get, read here and now without workers."""
        batches = plan_batches(self.make_sampler(self.seed), self.groups, self.batch_size)
        samples = self._samples(self.dicts)
        first = enumerate(itertools.islice(batches, count))
        return [[samples[key, iteration] for key in batch] for iteration, batch in first]


def describe_image(sample: dict) -> str:
    """File name and id of a sample, for messages."""
    return f"{sample.get('file_name')} (id {sample.get('image_id')})"


def training_records(cfg: CfgNode) -> List[dict]:
    """Dataset dicts of DATASETS.TRAIN that are trained on."""
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )


def _shared_seed() -> int:
    """Detectron2's, by an exchange that also tells of errors of other processes."""
    own = int(np.random.randint(2**31))
    return on_main_process(lambda: own)


def build_train_stream(cfg: CfgNode, second_images: bool = False) -> TrainStream:
    """The stream of DATASETS.TRAIN under Detectron2's DATALOADER and INPUT keys.

    SEED < 0 gives a random stream, the same in all processes.

    Args:
        second_images: samples of iterations before INPUT.PLAIN_FROM also have "second_image", of
            DATASETS.TRAIN_SECOND_IMAGES.
    Raises:
        UserError: unknown sampler or BAD_IMAGES, TIMEOUT below 0, IMS_PER_BATCH is not a multiple
            of the number of processes, or second images are missing.
    """
    batch_size, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
    if rest or batch_size == 0:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH: {cfg.SOLVER.IMS_PER_BATCH} images cannot be divided among "
            f"{comm.get_world_size()} processes"
        )
    dicts = training_records(cfg)
    if second_images:
        dicts = with_second_images(dicts, cfg.DATASETS.TRAIN_SECOND_IMAGES, cfg.DATASETS.TRAIN)
    plain_from = cfg.INPUT.PLAIN_FROM
    return TrainStream(
        dicts,
        ImageMapper(cfg, True, plain=False),
        _sampler_maker(cfg, dicts),
        batch_size=batch_size,
        seed=cfg.SEED if cfg.SEED >= 0 else _shared_seed(),
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        most_bad=_most_bad(cfg),
        timeout=cfg.DATALOADER.TIMEOUT,
        later=(plain_from, ImageMapper(cfg, True)) if plain_from else None,
    )


def _most_bad(cfg: CfgNode) -> int:
    policy, most = cfg.DATALOADER.BAD_IMAGES, cfg.DATALOADER.MAX_BAD_IMAGES
    if policy not in ("error", "skip"):
        raise UserError(f"DATALOADER.BAD_IMAGES: {policy!r} is neither 'error' nor 'skip'")
    if most < 0:
        raise UserError(f"DATALOADER.MAX_BAD_IMAGES: {most} is below 0")
    return most if policy == "skip" else 0


def _sampler_maker(cfg: CfgNode, dicts: list) -> Callable[[int], Iterable[int]]:
    """seed -> Detectron2's sampler of DATALOADER.SAMPLER_TRAIN; each rank gets its share."""
    name, size = cfg.DATALOADER.SAMPLER_TRAIN, len(dicts)
    if name == "TrainingSampler":
        return lambda seed: TrainingSampler(size, seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    raise UserError(
        f"DATALOADER.SAMPLER_TRAIN: {name!r} is neither 'TrainingSampler' nor "
        "'RepeatFactorTrainingSampler'"
    )
