"""A pair of tiny detectors for every method, found by trying, and what processes do with it."""

import copy
from pathlib import Path
from unittest import mock

import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from fgd.config import get_fgd_cfg
from fgd.distillation.needs import reasons
from fgd.methods.method import METHOD_REGISTRY
from tests.conftest import make_tiny_cfg

METHODS = sorted(name for name, method in METHOD_REGISTRY if method.__module__.startswith("fgd."))

# Keys under MODEL that a method needs beside its defaults in so small a world.
OPTIONS: dict = {
    "CrossKD": ("MODEL.DISTILLER.CROSSKD.REUSED_FROM", 1),
}

# Of methods that compare with what other processes see, under MODEL too: without those terms the
# gradient of two processes is the mean of what each gives alone. What those terms give there, the
# method's own tests say (`gdetkd/test_processes.py`).
ALONE: dict = {
    "GDetKD": ("MODEL.DISTILLER.GDETKD.CKD_WEIGHT", 0.0),
}


def detector_of(name: str) -> str:
    """The first architecture whose pairs have what the method needs."""
    node = METHOD_REGISTRY.get(name).node(get_fgd_cfg())
    needs = METHOD_REGISTRY.get(name).needs_of(node)
    for arch in ("RetinaNet", "GeneralizedRCNN"):
        model = build_model(make_tiny_cfg(arch))
        if not needs & reasons(model, model, True).keys():
            return arch
    raise AssertionError(f"no tiny pair for {name}")


def tiny_pair(name: str, folder: Path):
    """Config of a Distiller with the method under a random teacher of its own kind and width."""
    arch = detector_of(name)
    cfg, options = make_tiny_cfg(arch), OPTIONS.get(name, ())
    cfg.merge_from_list(list(options))
    torch.manual_seed(5)
    path = folder / f"teacher_{name}.pth"
    torch.save({"model": build_model(cfg).state_dict(), "config": cfg.dump()}, path)
    node = cfg.MODEL.DISTILLER
    node.STUDENT, cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE, "Distiller"
    node.METHOD, node.TEACHER.WEIGHTS = name, str(path)
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(folder)  # batches have them
    return cfg


def build(cfg, seed=0):
    torch.manual_seed(seed)
    return build_model(cfg).train()


def halves(make_batch):
    """A batch for each of two processes: other images, the same boxes."""
    return [make_batch([(64, 96), (64, 96)], seed=rank) for rank in range(2)]


def gradients(model, batch, rank: int, own) -> dict:
    """Of all losses, by parameter; ``own``: the Distiller inside ``model``."""
    torch.manual_seed(rank)  # R-CNN samples its proposals
    with EventStorage(3), mock.patch.object(comm, "get_rank", lambda: rank):
        sum(model(copy.deepcopy(batch)).values()).backward()
    return {k: p.grad.clone() for k, p in own.named_parameters() if p.requires_grad}


def distil_on_two(folder: str, batches: list, configs: dict) -> int:
    """In each of two processes: the gradients of every method under DDP; leaves rank{r}.pth."""
    rank, found = comm.get_rank(), {}
    for name, text in configs.items():
        cfg = get_fgd_cfg()
        cfg.merge_from_other_cfg(cfg.load_cfg(text))
        model = build(cfg)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        found[name] = gradients(parallel, batches[rank], rank, model)
    torch.save(found, Path(folder) / f"rank{rank}.pth")
    return 0
