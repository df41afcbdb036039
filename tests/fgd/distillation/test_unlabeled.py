"""Images without labels: drawn exactly, taught by the right terms, never taken for empty ones."""

import copy
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from fgd.config import check_config
from fgd.data.stream import build_train_stream
from fgd.data.unlabeled import unlabeled_records
from fgd.distillation.teacher import FrozenTeacher
from fgd.doctor.dataset import check_data
from fgd.doctor.losses import loss_table, measure
from fgd.engine.header import describe_run
from fgd.engine.same_start import describe_start
from fgd.engine.trainer import FGDTrainer
from fgd.errors import UserError
from fgd.methods.method import METHOD_REGISTRY, over_levels
from tests.fgd.engine.test_trainer import assert_same_end, begin_second, train
from tests.fgd.methods.every import METHODS, tiny_pair
from tests.fgd.training import distilled, training_cfg

TERMS = {"PKD": ["pkd_pearson"], "FGD": ["fgd_attention", "fgd_relation"]}
ON = "DATASETS.JSON.UNLABELED_IMAGES"


def write_images(folder, count=5, seed=7):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        size = ((64, 96, 3), (96, 64, 3))[i % 2]
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(folder / f"u{i}.png")
    return folder


def make_cfg(tmp_path, method="PKD", count=2, arch="RetinaNet", channels=16, opts=()):
    folder = write_images(tmp_path / "unlabeled")
    opts = (*opts, ON, str(folder), "DATALOADER.UNLABELED_PER_BATCH", count)
    cfg = training_cfg(tmp_path, arch, opts=opts)
    torch.manual_seed(1)
    cfg = distilled(cfg, tmp_path, channels=channels)
    cfg.MODEL.DISTILLER.METHOD = method
    return cfg


def test_processes_compare_their_own_images(tmp_path):
    cfg = make_cfg(tmp_path)
    before = describe_start(cfg, describe_run(cfg, unlabeled_records(cfg)))
    write_images(tmp_path / "unlabeled", seed=8)
    after = describe_start(cfg, describe_run(cfg, unlabeled_records(cfg)))
    assert {name for name, _ in before.items() ^ after.items()} == {"the images without labels"}


def stream_of(cfg):
    return FGDTrainer.build_train_loader(cfg)


def take(stream, count):
    return list(itertools.islice(iter(stream), count))


def names(batches):
    return [[Path(x["file_name"]).name for x in batch] for batch in batches]


def step(model, batch, iteration=0):
    with EventStorage(iteration):
        return model(copy.deepcopy(batch))


def fresh(cfg):
    """Each time the same: RetinaNet's losses depend on how many batches it has seen."""
    torch.manual_seed(1)
    return build_model(cfg).train()


def test_labelled_images_are_those_of_a_run_without_others(tmp_path):
    cfg = make_cfg(tmp_path)
    mixed, plain = take(stream_of(cfg), 6), take(build_train_stream(cfg), 6)
    assert names(x[:2] for x in mixed) == names(plain)
    for batch, other in zip(mixed, plain):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, other))
        assert [x.get("unlabeled", False) for x in batch] == [False, False, True, True]
        assert all("instances" not in x for x in batch[2:])
    drawn = sum(names(x[2:] for x in mixed), [])
    assert {drawn.count(f"u{i}.png") for i in range(5)} == {2, 3}  # 12 of a shuffle of 5


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_later_gives_the_same_samples(tmp_path, workers):
    cfg = make_cfg(tmp_path)
    expected = take(stream_of(cfg), 5)
    cfg.DATALOADER.NUM_WORKERS = workers
    stream = stream_of(cfg)
    stream.start = 3
    found = take(stream, 2)
    assert names(found) == names(expected[3:])
    for batch, other in zip(found, expected[3:]):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, other))
    assert names(stream.first_batches(2)) == names(expected[:2])


def test_ranks_share_one_shuffle(tmp_path, monkeypatch):
    cfg = make_cfg(tmp_path)
    whole = sum(names(x[2:] for x in take(stream_of(cfg), 5)), [])
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        found = take(stream_of(cfg), 5)
        assert sum(names(x[1:] for x in found), []) == whole[rank::2]
    cfg.DATALOADER.UNLABELED_PER_BATCH = 3
    with pytest.raises(UserError, match="UNLABELED_PER_BATCH: 3 images cannot be divided among 2"):
        stream_of(cfg)


def test_test_images_are_refused_and_labelled_ones_left_out(tmp_path):
    cfg = make_cfg(tmp_path)
    assert len(unlabeled_records(cfg)) == 5
    shutil.copy(tmp_path / "data" / "images" / "3.png", tmp_path / "unlabeled" / "renamed.png")
    with pytest.raises(
        UserError, match=r"1 of 6 images are test images \(the first: .*renamed.png"
    ):
        stream_of(cfg)
    cfg.DATASETS.TEST = ()
    assert len(unlabeled_records(cfg)) == 5
    cfg.DATASETS.JSON.UNLABELED_IMAGES = str(tmp_path / "data" / "images")
    with pytest.raises(UserError, match="all 6 images of .* are in the training set"):
        unlabeled_records(cfg)
    cfg.DATASETS.JSON.UNLABELED_IMAGES = str(tmp_path / "none")
    with pytest.raises(UserError, match="DATASETS.JSON.UNLABELED_IMAGES: there is no folder"):
        unlabeled_records(cfg)


@pytest.mark.parametrize("method", TERMS)
def test_terms_are_those_of_the_images_alone(tmp_path, method):
    """Detection losses and terms of labelled images are as without the others; theirs are the
    boxless terms of a batch of them alone."""
    cfg = make_cfg(tmp_path, method)
    batch = stream_of(cfg).first_batches(1)[0]
    model = fresh(cfg)
    losses = step(model, batch)
    unlabelled = [f"loss_unlabeled_{name}" for name in TERMS[method]]
    assert list(model.unlabeled.loss_names) == unlabelled
    alone = step(fresh(cfg), batch[:2])
    for name in losses.keys() - set(unlabelled):
        torch.testing.assert_close(losses[name], alone[name], msg=name)
    with_boxes = [{**x, "instances": batch[0]["instances"]} for x in batch[2:]]
    for x in with_boxes:
        x.pop("unlabeled")
        x["instances"]._image_size = tuple(x["image"].shape[-2:])
    others = step(fresh(cfg), with_boxes)
    for name in unlabelled:
        expected = others[name.replace("unlabeled_", "")]
        torch.testing.assert_close(losses[name], expected, msg=name)
        assert losses[name] > 0 and alone[name] == 0
    cfg.MODEL.DISTILLER.UNLABELED_WEIGHT = 0.5
    half = step(fresh(cfg), batch)
    for name in unlabelled:
        torch.testing.assert_close(half[name], losses[name] / 2, msg=name)


@pytest.mark.parametrize("name", [x for x in METHODS if METHOD_REGISTRY.get(x).boxless])
def test_boxless_terms_are_the_same_whatever_the_boxes(tmp_path, make_batch, name):
    """And the others of the same method are not."""
    cfg, batch = tiny_pair(name, tmp_path), make_batch()
    none = [{**x, "instances": x["instances"][:0]} for x in batch]
    whole, without = (step(fresh(cfg), x) for x in (batch, none))
    method = METHOD_REGISTRY.get(name)
    for term in method.terms:
        key = f"loss_{name.lower()}_{term}"
        assert (whole[key] == without[key]) == (term in method.boxless), key
    assert sum(whole[f"loss_{name.lower()}_{term}"] for term in method.boxless) > 0


def test_gradients_under_ddp_are_those_of_the_plain_model(tmp_path):
    """With parameters that only some images reach, twice in one step."""
    cfg = make_cfg(tmp_path, "FGD")
    batch = stream_of(cfg).first_batches(1)[0]
    address = f"file://{tmp_path / 'meeting'}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        found = []
        for wrap in (lambda x: x, nn.parallel.DistributedDataParallel):
            own = fresh(cfg)
            whole = wrap(own)
            for _ in range(2):  # the second step would wait for gradients that were left out
                sum(step(whole, batch).values()).backward()
            found.append({k: p.grad for k, p in own.named_parameters() if p.requires_grad})
        for name, wanted in found[0].items():
            torch.testing.assert_close(found[1][name], wanted, msg=name)
    finally:
        dist.destroy_process_group()


def test_its_gradient_reaches_the_backbone_alone(tmp_path):
    cfg = make_cfg(tmp_path)
    batch = stream_of(cfg).first_batches(1)[0]
    model = fresh(cfg)
    losses = step(model, batch)
    losses["loss_unlabeled_pkd_pearson"].backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()}
    assert moved and all(name.startswith("student.backbone") for name in moved)


def test_boxes_of_the_teacher(tmp_path):
    cfg = make_cfg(tmp_path, "FGD")
    cfg.MODEL.DISTILLER.PSEUDO_BOXES = 0.005
    batch = stream_of(cfg).first_batches(1)[0]
    teacher_cfg = (tmp_path / "teacher.yaml").read_text()
    low = teacher_cfg.replace("SCORE_THRESH_TEST: 0.05", "SCORE_THRESH_TEST: 0.0")
    (tmp_path / "teacher.yaml").write_text(low)
    model = fresh(cfg)
    found = model.teacher.detect(batch[2:], 0.005)
    assert all(len(x) for x in found)
    assert [x.image_size for x in found] == [tuple(x["image"].shape[-2:]) for x in batch[2:]]
    losses = step(model, batch)
    names = [f"loss_unlabeled_fgd_{x}" for x in ("foreground", "background")]
    assert all(losses[name] > 0 for name in names)
    given = [{k: v for k, v in x.items() if k != "unlabeled"} for x in batch[2:]]
    expected = step(fresh(cfg), [{**x, "instances": y} for x, y in zip(given, found)])
    for name in names:
        own = expected[name.replace("unlabeled_", "")]
        torch.testing.assert_close(losses[name], own, msg=name)


def test_an_image_without_a_confident_detection_is_unknown(tmp_path, monkeypatch):
    cfg = make_cfg(tmp_path, "FGD")
    batch = stream_of(cfg).first_batches(1)[0]
    boxless = step(fresh(cfg), batch)
    cfg.MODEL.DISTILLER.PSEUDO_BOXES = 0.5
    truth, found = [x["instances"] for x in batch[:2]], []
    for x, count in zip(batch[2:], (2, 0)):
        rows = {"gt_boxes": truth[0].gt_boxes[:count], "gt_classes": truth[0].gt_classes[:count]}
        found.append(Instances(tuple(x["image"].shape[-2:]), **rows))
    monkeypatch.setattr(FrozenTeacher, "detect", lambda *_: found)
    losses = step(fresh(cfg), batch)
    for name in TERMS["FGD"]:
        key = f"loss_unlabeled_{name}"
        torch.testing.assert_close(losses[key], boxless[key], msg=key)
    # Of the first image alone, on the maps of both: as if the second one had no cell.
    monkeypatch.setattr(FrozenTeacher, "detect", lambda *_: found[:1] * 2)
    model = fresh(cfg)
    seen = []
    table = model.distillation.table
    model.distillation.table = lambda x: seen.append(x) or table(x)
    step(model, batch)
    with torch.no_grad():
        alone = over_levels(model.distillation.table(seen[-1].images([0])))
    for term in ("foreground", "background"):
        key = f"loss_unlabeled_fgd_{term}"
        torch.testing.assert_close(losses[key], alone[f"fgd_{term}"] / 2, msg=key)
    monkeypatch.setattr(FrozenTeacher, "detect", lambda *_: found[1:] * 2)
    none = step(fresh(cfg), batch)
    assert none["loss_unlabeled_fgd_background"] == 0 < none["loss_unlabeled_fgd_attention"]


@pytest.mark.parametrize(
    "opts, said",
    [
        (("DATALOADER.UNLABELED_PER_BATCH", -1), "UNLABELED_PER_BATCH: -1 is below 0"),
        (("DATALOADER.UNLABELED_PER_BATCH", 0), "but DATALOADER.UNLABELED_PER_BATCH is 0"),
        ((ON, ""), "UNLABELED_PER_BATCH: 2, but DATASETS.JSON.UNLABELED_IMAGES names no folder"),
        (("MODEL.DISTILLER.METHOD", "NKD"), "no term of MODEL.DISTILLER.METHOD NKD counts"),
        (("MODEL.DISTILLER.PSEUDO_BOXES", 1.0), "PSEUDO_BOXES: 1.0 is no score"),
        (("MODEL.DISTILLER.UNLABELED_WEIGHT", -1.0), "UNLABELED_WEIGHT: -1.0 is not a finite"),
    ],
)
def test_mistakes_are_named(tmp_path, opts, said):
    cfg = make_cfg(tmp_path)
    cfg.merge_from_list(list(opts))
    with pytest.raises(UserError, match=said):
        check_config(cfg)


def test_resumed_training_is_bit_equal_and_another_folder_is_refused(tmp_path):
    cfg = make_cfg(tmp_path, "FGD+PKD", opts=("SOLVER.BASE_LR", 1e-3))
    cfg.DATASETS.TEST = ()
    train(cfg)
    first = Path(cfg.OUTPUT_DIR)
    begin_second(cfg, tmp_path / "second")
    moved = tmp_path / "moved"
    (tmp_path / "unlabeled").rename(moved)
    cfg.DATASETS.JSON.UNLABELED_IMAGES = str(moved)  # the same images elsewhere
    assert train(cfg, resume=True).start_iter == 4
    assert_same_end(first, tmp_path / "second")
    begin_second(cfg, tmp_path / "third")
    write_images(moved, 6)
    with pytest.raises(UserError, match="images of DATASETS.JSON.UNLABELED_IMAGES"):
        train(cfg, resume=True)


def test_doctor_counts_images_and_shows_terms_of_both(tmp_path):
    cfg = make_cfg(tmp_path)
    stream = stream_of(cfg)
    found = check_data(stream.dicts, ["square", "disc", "cross"], {}, "", len(stream.unlabeled))
    assert "6 training images, 12 boxes, and 5 images without labels" in found.found
    measured = measure(build_model(cfg), stream.first_batches(2))
    table = loss_table(measured, 1.0)
    assert "p3_unlabeled" in table and "unlabeled_pkd_pearson" in table
    assert "loss_unlabeled_pkd_pearson" in measured.gradients
    assert not any("unlabeled" in name for name in measured.detection)
