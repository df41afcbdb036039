"""Every family's classification losses rise on what is stored, and the teacher stays as it was."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from fgd.adversarial.attack import Settings
from fgd.adversarial.victim import Victim, classification, train_without_statistics
from fgd.data.images import ImageMapper
from fgd.data.stream import training_records
from fgd.doctor.untouched import untouched
from fgd.errors import UserError
from tests.fgd.distillation.test_distiller import cascade_mask, fcos, reppoints
from tests.fgd.training import CLASSES, training_cfg

TEACHERS = {
    "RetinaNet": lambda make: make("RetinaNet"),
    "Faster": lambda make: make("GeneralizedRCNN"),
    "CascadeMask": lambda make: cascade_mask(make, 16),
    "FCOS": lambda make: fcos(make, 16),  # takes RGB
    "RepPoints": reppoints,
}
LOSSES = {
    "RetinaNet": {"loss_cls"},
    "Faster": {"loss_cls", "loss_rpn_cls"},
    "CascadeMask": {"loss_cls_stage0", "loss_cls_stage1", "loss_cls_stage2", "loss_rpn_cls"},
    "FCOS": {"loss_fcos_cls"},
    "RepPoints": {"loss_cls"},
}


def attacked_cfg(tmp_path, teacher, opts=()):
    """Config of a run whose teacher has seeded weights."""
    torch.manual_seed(3)
    torch.save({"model": build_model(teacher).state_dict()}, tmp_path / "teacher.pth")
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    cfg = training_cfg(tmp_path, opts=opts)
    cfg.INPUT.MIN_SIZE_TEST = 80  # images of the set are 96x64 and 64x96
    cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.yaml")
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(tmp_path / "teacher.pth")
    return cfg


def stored_loss(victim, record, path, wanted):
    """The losses on a file as training's test pipeline would read it: resized by Pillow."""
    mapper = ImageMapper(
        is_train=True, augmentations=[T.ResizeShortestEdge(80, 128)], image_format=victim.format
    )
    sample = mapper({**record, "file_name": str(path)})
    with torch.no_grad(), untouched(victim.model):
        torch.manual_seed(0)
        losses = victim.model([sample])
    assert wanted == {name for name in losses if "cls" in name}
    return classification(losses).item()


@pytest.mark.parametrize("family", TEACHERS)
def test_the_losses_of_stored_images_rise(family, tiny_cfg, tmp_path):
    cfg = attacked_cfg(tmp_path, TEACHERS[family](tiny_cfg))
    victim = Victim(cfg, CLASSES)
    before = {k: v.clone() for k, v in victim.model.state_dict().items()}
    for record in training_records(cfg)[:2]:
        found = victim.mislead(record, "a", Settings())
        clean = np.asarray(Image.open(record["file_name"]))
        assert found.dtype == torch.uint8 and tuple(found.shape) == clean.transpose(2, 0, 1).shape
        pixels = found.permute(1, 2, 0).numpy()
        assert 4 <= np.abs(pixels.astype(int) - clean).max() <= 8
        Image.fromarray(pixels).save(tmp_path / "found.png")
        noise = np.random.default_rng(0).choice([-8, 8], clean.shape) + clean
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(tmp_path / "noise.png")
        plain, attacked, noisy = (
            stored_loss(victim, record, path, LOSSES[family])
            for path in (record["file_name"], tmp_path / "found.png", tmp_path / "noise.png")
        )
        assert attacked > plain
        assert attacked - plain > 2 * abs(noisy - plain), (plain, attacked, noisy)
    after = victim.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("family", ["RetinaNet", "Faster"])
def test_images_depend_on_their_names_alone(family, tiny_cfg, tmp_path):
    """Not on those made before, nor on the state of any generator: so a stopped command goes on."""
    cfg = attacked_cfg(tmp_path, TEACHERS[family](tiny_cfg))
    first, second = training_records(cfg)[:2]
    victim = Victim(cfg, CLASSES)
    wanted = [victim.mislead(first, "a", Settings()), victim.mislead(second, "b", Settings())]
    # RetinaNet keeps a running number of foreground anchors as a plain attribute.
    attributes = set(vars(victim.model))
    state = torch.get_rng_state()
    assert torch.equal(victim.mislead(second, "b", Settings()), wanted[1])
    assert torch.equal(torch.get_rng_state(), state) and set(vars(victim.model)) == attributes
    assert torch.equal(Victim(cfg, CLASSES).mislead(second, "b", Settings()), wanted[1])
    assert not torch.equal(victim.mislead(first, "c", Settings()), wanted[0])


@pytest.mark.parametrize("family", TEACHERS)
def test_an_image_without_objects_is_attacked_as_background(family, tiny_cfg, tmp_path):
    cfg = attacked_cfg(
        tmp_path, TEACHERS[family](tiny_cfg), ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    )
    path = tmp_path / "data" / "data.json"
    content = json.loads(path.read_text())
    content["annotations"] = [x for x in content["annotations"] if x["image_id"]]
    path.write_text(json.dumps(content))
    cfg = attacked_cfg(
        tmp_path, TEACHERS[family](tiny_cfg), ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    )
    (record,) = [x for x in training_records(cfg) if not x["annotations"]]
    victim = Victim(cfg, CLASSES)
    # The loss of an untrained network without objects is flat: long steps overshoot.
    settings = Settings(step=0.5 / 255, steps=16, diversity_prob=0.0)
    found = victim.mislead(record, "a", settings).permute(1, 2, 0).numpy()
    clean = np.asarray(Image.open(record["file_name"]))
    assert 1 <= np.abs(found.astype(int) - clean).max() <= 8
    Image.fromarray(found).save(tmp_path / "found.png")
    plain, attacked = (
        stored_loss(victim, record, x, LOSSES[family])
        for x in (record["file_name"], tmp_path / "found.png")
    )
    assert attacked > plain


def test_boxes_are_those_of_the_size_that_the_network_sees(tiny_cfg, tmp_path):
    cfg = attacked_cfg(tmp_path, tiny_cfg("RetinaNet"))
    victim, seen = Victim(cfg, CLASSES), []
    victim.loss = lambda image, instances: seen.append((image, instances)) or image.sum()
    record = training_records(cfg)[0]
    victim.mislead(record, "a", Settings(diversity_prob=0.0))
    image, instances = seen[0]
    assert image.shape == (3, 80, 120) and instances.image_size == (80, 120)
    x, y, w, h = record["annotations"][0]["bbox"]
    wanted = torch.tensor([x, y, x + w, y + h]) * 1.25
    torch.testing.assert_close(instances.gt_boxes.tensor[0], wanted)
    cfg.INPUT.MIN_SIZE_TEST = 0
    victim = Victim(cfg, CLASSES)
    victim.loss = lambda image, instances: seen.append((image, instances)) or image.sum()
    victim.mislead(record, "a", Settings(diversity_prob=0.0))
    assert seen[-1][0].shape == (3, 64, 96)


def test_statistics_and_dropout_rest():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.head = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Sequential())
            self.roi_heads = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, 4, 1)])])

    model = Detector()
    train_without_statistics(model)
    assert model.training and model.roi_heads.training and model.head.training
    resting = [model.backbone, *model.backbone, *model.head]
    assert not any(x.training for x in resting)


def test_only_losses_of_classes_are_summed():
    one = torch.tensor(1.0)
    losses = {"loss_cls": one, "loss_rpn_cls": 2 * one, "loss_box_reg": 8 * one, "loss_mask": one}
    assert classification(losses) == 3
    with pytest.raises(UserError, match="no classification loss to attack; it has loss_box_reg"):
        classification({"loss_box_reg": one})


def test_teachers_that_cannot_be_attacked_are_refused(tiny_cfg, tmp_path):
    cfg = attacked_cfg(tmp_path, tiny_cfg("RetinaNet"))
    with pytest.raises(UserError, match="3 classes, the dataset 2 .* needs one of the same"):
        Victim(cfg, CLASSES[:2])
    weights, cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = cfg.MODEL.DISTILLER.TEACHER.WEIGHTS, ""
    with pytest.raises(UserError, match="WEIGHTS is empty: name the teacher to attack"):
        Victim(cfg, CLASSES)
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = weights
    content = torch.load(weights, weights_only=True)
    content["model"].popitem()
    torch.save(content, weights)
    with pytest.raises(UserError, match="1 not in the file"):
        Victim(cfg, CLASSES)
