"""Does a training work on a GPU, and does it go on after a stop as if nothing had been?"""

import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng

from ..data.datasets import register_from_config
from ..engine.trainer import FGDTrainer
from ..processes.rng import preserved
from ..weights import read_weights
from .gpu_pairs import Settings, small_pair
from .gpu_report import note, row

_FALLEN = 0.8  # mean loss of the last steps over that of the first ones
_SAVED = ("model", "distiller", "trainer", "rng")  # of a checkpoint
_NO_WAY = "does not have a deterministic implementation"


def _training(settings: Settings, folder: Path, iterations: int, images: int) -> CfgNode:
    """A distillation of RetinaNet on drawn shapes; in mixed precision on a GPU."""
    cfg = small_pair("retinanet", settings.device, folder, channels=16 if settings.tiny else 64)
    cfg.DATASETS.SHAPES.ROOT = str(folder / "shapes")
    cfg.DATASETS.SHAPES.TRAIN_IMAGES = images
    cfg.DATASETS.SHAPES.CONTRAST = 90.0
    cfg.DATASETS.TEST = ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 1
    solver = cfg.SOLVER
    solver.AMP.ENABLED = torch.device(settings.device).type == "cuda"
    solver.OPTIMIZER, solver.BASE_LR = "AdamW", 0.001
    solver.IMS_PER_BATCH = 4 if settings.tiny else 16
    solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS = iterations, (), 5
    solver.CHECKPOINT_PERIOD = 10**6
    return register_from_config(cfg, ("TRAIN",))


def _train(cfg: CfgNode, folder: Path, resume: bool = False) -> FGDTrainer:
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    folder.mkdir(exist_ok=True)
    with preserved():
        seed_all_rng(cfg.SEED)
        trainer = FGDTrainer(cfg)
        trainer.resume_or_load(resume)
        trainer.train()
    return trainer


def measure_training(settings: Settings) -> Dict[str, Any]:
    """The total loss over 200 iterations has to fall."""
    iterations, images = (14, 4) if settings.tiny else (200, 320)
    with tempfile.TemporaryDirectory() as folder:
        cfg = _training(settings, Path(folder), iterations, images)
        trainer = _train(cfg, Path(folder) / "run")
    losses = {name: _logged(trainer, name) for name in sorted(trainer.storage.histories())}
    losses = {name: values for name, values in losses.items() if "loss" in name}
    few = max(iterations // 10, 1)
    rows = []
    for name, values in losses.items():
        whole = name == "total_loss"
        first, last = np.mean(values[:few]), np.mean(values[-few:])
        what = f"{name}, mean of the last {few} iterations over that of the first"
        rows.append(row(what, last / first, _FALLEN if whole else None, must=whole))
    rows.append(row("seconds per iteration, data included", np.median(_logged(trainer, "time"))))
    if cfg.SOLVER.AMP.ENABLED:
        rows.append(row("loss scale at the end", trainer._trainer.grad_scaler.get_scale()))
    return {"rows": rows, "losses": losses}


def _logged(trainer: FGDTrainer, name: str) -> List[float]:
    return [float(x) for x, _ in trainer.storage.history(name).values()]


def measure_resume(settings: Settings, deterministic: bool) -> Dict[str, Any]:
    """A run, the same again, and one that goes on from its middle: are their ends equal?

    Unlike ends of two equal runs from the start are CUDA's doing, not the resume's; an unlike end
    of the resumed run alone is an error.

    Args:
        deterministic: ask PyTorch for kernels that give equal bits, and name those that it lacks.
    """
    with tempfile.TemporaryDirectory() as name, _deterministic(deterministic) as lacking:
        folder = Path(name)
        whole = 4 if settings.tiny else 8
        cfg = _training(settings, folder, iterations=whole, images=16)
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.CHECKPOINT_PERIOD = 4, whole // 2
        first, again, resumed = (folder / x for x in ("first", "again", "resumed"))
        _train(cfg, first)
        _train(cfg, again)
        resumed.mkdir()
        middle = f"model_{whole // 2 - 1:07d}.pth"
        shutil.copy(first / middle, resumed)
        (resumed / "last_checkpoint").write_text(middle)
        start = _train(cfg, resumed, resume=True).start_iter
        ends = [_saved(x / "model_final.pth") for x in (first, again, resumed)]
    apart, unlike = (first_difference(ends[0], other) for other in ends[1:])
    return {
        "rows": [
            note("resumed at", f"iteration {start} of {whole}", 2 * start == whole, must=True),
            note("twice from the start", _words(apart)),
            note("resumed against uninterrupted", _words(unlike), *_verdict(apart, unlike)),
            *(note("no deterministic kernel", x) for x in sorted(lacking)),
        ]
    }


def _verdict(apart: Optional[str], unlike: Optional[str]) -> Tuple[bool, bool]:
    """Whether the resumed run is equal, and whether it had to be."""
    return unlike is None, apart is None


def _words(difference: Optional[str]) -> str:
    return difference or "bit-equal"


def _saved(path: Path) -> Dict[str, Any]:
    found = read_weights(str(path))
    return {key: found[key] for key in _SAVED}


def first_difference(a: Any, b: Any) -> Optional[str]:
    """The first of two nested values that differs, by how much, and how many do; None if none."""
    ours, theirs = (dict(_leaves(x)) for x in (a, b))
    if ours.keys() != theirs.keys():
        return f"{sorted(ours.keys() ^ theirs.keys())[0]} is in one of them only"
    unlike = [name for name, value in ours.items() if not _equal(value, theirs[name])]
    if not unlike:
        return None
    name, size = unlike[0], ""
    if isinstance(ours[name], torch.Tensor) and ours[name].shape == theirs[name].shape:
        size = f" by {(ours[name].double() - theirs[name].double()).abs().max():.1e}"
    return f"{name} differs{size}; {len(unlike)} of {len(ours)} values do"


def _leaves(value: Any, path: str = "") -> Iterator[Tuple[str, Any]]:
    pairs: List[Tuple[Any, Any]]
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, (list, tuple)):
        pairs = list(enumerate(value))
    else:
        yield path, value
        return
    for key, part in pairs:
        yield from _leaves(part, f"{path}.{key}" if path else str(key))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and (a == b or (a != a and b != b))


@contextmanager
def _deterministic(wanted: bool) -> Iterator[set]:
    """Yields a set that names, afterwards, the operations that PyTorch has no such kernel for."""
    lacking: set = set()
    if not wanted:
        yield lacking
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS begins, in this process
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lacking
    finally:
        torch.use_deterministic_algorithms(False)
    said = [str(x.message) for x in caught]
    lacking.update(text.split(_NO_WAY)[0].strip() for text in said if _NO_WAY in text)
