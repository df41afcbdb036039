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
from torch.utils.data import DataLoader

from ..errors import UserError
from ..processes.together import on_main_process
from .images import BadImage, ImageMapper
from .samples import Mapper, SampleKey, SeededSamples
from .second_images import with_second_images
from .unlabeled import COUNT, unlabeled_records
from .workers import check_timeout, supervise, supervised_batches

logger = logging.getLogger(__name__)

_UNLABELED = 2  # the group of images without labels; their sizes are unknown before they are read


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


class TrainStream:
    """Iterate to get this rank's batches, lists of Detectron2's training dicts, without end.

    Set ``start``, the training iteration that gets the first batch, or ``seed`` before a batch is
    drawn. Iterating raises BadImage when more than ``most_bad`` different images are bad, and
    UserError when workers need more than ``timeout`` seconds (0: any time) for a batch.

    ``later``: from this iteration on samples are made by this mapper instead.
    ``unlabeled``: images without labels, of which each batch has ``unlabeled_size`` behind its
    others, by a shuffle of their own; the others are the same with them as without.
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
        unlabeled: Sequence[dict] = (),
        unlabeled_size: int = 0,
        unlabeled_mapper: Optional[Mapper] = None,
    ):
        self.dicts, self.mapper, self.make_sampler = dicts, mapper, make_sampler
        self.later = later
        self.batch_size, self.num_workers = batch_size, num_workers
        self.timeout = check_timeout(timeout)
        self.groups = [0] * len(dicts)
        if group_by_aspect_ratio:
            self.groups = [0 if x["width"] > x["height"] else 1 for x in dicts]
        self.groups += [_UNLABELED] * len(unlabeled)
        self.unlabeled, self.unlabeled_size = list(unlabeled), unlabeled_size
        self._unlabeled_mapper = unlabeled_mapper
        self._all = [*dicts, *unlabeled]
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
            self._samples(DatasetFromList(self._all, copy=False)),
            batch_sampler=self._planned(ahead),
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            # Without one of its own, the loader draws from the global generator.
            generator=Generator(),
        )
        names = lambda: ", ".join(describe_image(self._all[i]) for i, _ in ahead[0])  # noqa: E731
        for batch in supervised_batches(supervise(loader, self.timeout), names):
            ahead.popleft()
            for sample in batch:
                self._count(sample.pop("skipped", ()))
            self.last_images = [describe_image(sample) for sample in batch]
            yield batch

    def _planned(self, ahead: Deque[List[SampleKey]]) -> Iterator[List[Tuple[SampleKey, int]]]:
        for iteration, batch in enumerate(self._batches()):
            if iteration >= self.start:
                ahead.append(batch)
                yield [(key, iteration) for key in batch]

    def _batches(self) -> Iterator[List[SampleKey]]:
        batches = plan_batches(self.make_sampler(self.seed), self.groups, self.batch_size)
        if not self.unlabeled:
            return batches
        shuffle = TrainingSampler(len(self.unlabeled), seed=self.seed + 1)
        behind = (len(self.dicts) + i for i in shuffle)
        more = plan_batches(behind, self.groups, self.unlabeled_size)
        return ([*own, *other] for own, other in zip(batches, more))

    def _samples(self, dicts: Sequence[dict]) -> SeededSamples:
        own = self.groups, self.most_bad, len(self.dicts), self._unlabeled_mapper
        return SeededSamples(dicts, self._mapper_of, self.seed, *own)

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
        samples = self._samples(self._all)
        first = enumerate(itertools.islice(self._batches(), count))
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


def build_train_stream(
    cfg: CfgNode, second_images: bool = False, unlabeled: bool = False
) -> TrainStream:
    """The stream of DATASETS.TRAIN under Detectron2's DATALOADER and INPUT keys.

    SEED < 0 gives a random stream, the same in all processes.

    Args:
        second_images: samples of iterations before INPUT.PLAIN_FROM also have "second_image", of
            DATASETS.TRAIN_SECOND_IMAGES.
        unlabeled: batches also have images of DATASETS.JSON.UNLABELED_IMAGES, marked, behind the
            others; INPUT.SAMPLE_SPECIFIC, which looks at boxes, does not apply to them.
    Raises:
        UserError: unknown sampler or BAD_IMAGES, TIMEOUT below 0, IMS_PER_BATCH is not a multiple
            of the number of processes, or second images are missing; see `unlabeled_records` too.
    """
    batch_size = _share("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH)
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
        **(_unlabeled(cfg) if unlabeled else {}),
    )


def _unlabeled(cfg: CfgNode) -> dict:
    return {
        "unlabeled": unlabeled_records(cfg),
        "unlabeled_size": _share(COUNT, cfg.DATALOADER.UNLABELED_PER_BATCH),
        "unlabeled_mapper": ImageMapper(cfg, True),
    }


def _share(key: str, images: int) -> int:
    """Of each process in the images of a batch."""
    share, rest = divmod(images, comm.get_world_size())
    if rest or share == 0:
        raise UserError(
            f"{key}: {images} images cannot be divided among {comm.get_world_size()} processes"
        )
    return share


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
