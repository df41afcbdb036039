import itertools

import pytest
import torch
from detectron2.utils import comm

from fgd.data.stream import build_train_stream, plan_batches
from fgd.errors import UserError
from tests.fgd.training import training_cfg


def take(stream, count):
    return list(itertools.islice(iter(stream), count))


def names(batches):
    return [[x["file_name"].rsplit("/", 1)[1] for x in batch] for batch in batches]


def assert_same_batches(actual, expected):
    assert names(actual) == names(expected)
    for a, b in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert torch.equal(a["image"], b["image"])
        boxes = (x["instances"].gt_boxes.tensor for x in (a, b))
        assert torch.equal(*boxes)


def test_plan_batches_groups_and_keeps_positions():
    indices, groups = [0, 1, 2, 3, 1, 0], [0, 1, 0, 1]
    expected = [[(0, 0), (2, 2)], [(1, 1), (3, 3)]]  # 1 and 0 at the end wait for a partner
    assert list(plan_batches(indices, groups, 2)) == expected
    assert list(plan_batches(indices, [0] * 4, 4)) == [[(0, 0), (1, 1), (2, 2), (3, 3)]]


def test_batches_hold_one_orientation_and_each_image_once_per_epoch(tmp_path):
    batches = take(build_train_stream(training_cfg(tmp_path)), 9)
    for batch in batches:
        assert len({x["width"] > x["height"] for x in batch}) == 1
    flat = sum(names(batches), [])
    # Grouping delays at most one image per orientation, so counts differ by at most one.
    assert {flat.count(f"{i}.png") for i in range(6)} <= {2, 3, 4}


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_later_gives_the_same_samples_for_any_number_of_workers(tmp_path, workers):
    cfg = training_cfg(tmp_path)
    expected = take(build_train_stream(cfg), 7)
    assert len({x["image"].shape for x in itertools.chain(*expected)}) > 2, "no augmentation seen"
    stream = build_train_stream(
        training_cfg(tmp_path, opts=("DATALOADER.NUM_WORKERS", workers, "SEED", 5))
    )
    stream.seed, stream.start = cfg.SEED, 4  # as resuming sets them
    torch.rand(3)  # the global generators do not matter
    assert_same_batches(take(stream, 3), expected[4:])


def test_first_batches_are_those_that_training_gets(tmp_path):
    cfg = training_cfg(tmp_path, opts=("DATALOADER.NUM_WORKERS", 2))
    assert_same_batches(build_train_stream(cfg).first_batches(5), take(build_train_stream(cfg), 5))


def test_ranks_share_one_shuffle_without_overlap(tmp_path, monkeypatch):
    opts = ("DATALOADER.ASPECT_RATIO_GROUPING", False, "SOLVER.IMS_PER_BATCH", 2)
    whole = sum(names(take(build_train_stream(training_cfg(tmp_path, opts=opts)), 6)), [])
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    cfg = training_cfg(tmp_path, opts=opts)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        assert sum(names(take(build_train_stream(cfg), 6)), []) == whole[rank::2]


def test_repeat_factor_sampler_is_continued_too(tmp_path):
    opts = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    opts += ("DATALOADER.REPEAT_THRESHOLD", 0.9)
    cfg = training_cfg(tmp_path, opts=opts)
    expected = take(build_train_stream(cfg), 5)
    stream = build_train_stream(cfg)
    stream.start = 3
    assert_same_batches(take(stream, 2), expected[3:])


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="SAMPLER_TRAIN: 'Best'"):
        build_train_stream(training_cfg(tmp_path, opts=("DATALOADER.SAMPLER_TRAIN", "Best")))
    with pytest.raises(UserError, match="3 images cannot be divided among 2"):
        cfg = training_cfg(tmp_path, opts=("SOLVER.IMS_PER_BATCH", 3))
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        build_train_stream(cfg)


def test_unreadable_image_is_named(tmp_path):
    cfg = training_cfg(tmp_path)
    for image in (tmp_path / "data" / "images").iterdir():
        image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cannot read .*\d\.png"):
        take(build_train_stream(cfg), 1)
