"""How fast is it on a GPU? The loss against its traffic in memory, and whole training steps."""

import tempfile
from pathlib import Path
from typing import Any, Dict, List

from . import loss, step
from .goals import HELD, MANY_BOXES, PEAK, STEP
from .gpu_pairs import Settings, small_pair, zoo_pair
from .gpu_report import Row, note, row

FLOOR = 2.0  # times what its 5 U of traffic take at the speed of copying


def measure_loss(
    settings: Settings, pyramid: str, dtype: str, implementation: str
) -> Dict[str, Any]:
    """`loss.measure` at the size of a batch of two images, and its goals on a GPU."""
    tiny = settings.tiny
    of_loss = loss.Settings(
        pyramid=pyramid,
        size=settings.padded,
        channels=8 if tiny else 256,
        boxes=(1, 3) if tiny else (1, 50, 300),
        rounds=1 if tiny else 10,
        threads=settings.threads,
        device=settings.device,
        dtype=dtype,
        only=(implementation,),
    )
    run = loss.measure(of_loss)
    rows = [
        row("copying, GB/s", run["copy_gb_per_s"]),
        row("floor of 5 U, ms", run["floor_ms"]),
        row("largest difference from per box", run["difference"]),
    ]
    for own in run["rows"]:
        rows += _loss_rows(own, judged=own["implementation"] == implementation)
    return {"rows": rows + _noise(run), "measured": run}


def _loss_rows(own: Dict[str, Any], judged: bool) -> List[Row]:
    where = f"{own['implementation']}, {own['boxes']} boxes"
    rows = [row(f"{where}: ms", own["median_ms"])]
    if judged:
        rows += [
            row(f"{where}: over the floor", own["over_floor"], FLOOR),
            row(f"{where}: over the fewest boxes", own["over_fewest"], MANY_BOXES),
            row(f"{where}: peak, U", own["peak_u"], PEAK),
            row(f"{where}: held for backward, U", own["held_u"], HELD),
        ]
    return rows


def measure_step(settings: Settings, pyramid: str, amp: bool) -> Dict[str, Any]:
    """`step.measure` of FGD with R-50 under R-101, random weights, at 800x1333, batch 2."""
    rounds = 1 if settings.tiny else 10
    shape = step.Settings(
        settings.size,
        batch=2,
        boxes=3 if settings.tiny else 20,
        rounds=rounds,
        threads=settings.threads,
        variants=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        if settings.tiny:
            cfg = small_pair(pyramid, settings.device, Path(folder))
        else:
            cfg = zoo_pair(pyramid, settings.device, amp)
        run = step.measure(cfg, shape)
    rows = []
    for part in run["parts"]:
        rows.append(row(f"{part['part']}: ms", part["median_ms"]))
        if part["peak_bytes"] is not None:
            rows.append(row(f"{part['part']}: peak, MiB", part["peak_bytes"] / 2**20))
    rows.append(row("distillation step over student step + teacher", run["over_parts"], STEP))
    return {"rows": rows + _noise(run), "measured": run}


def _noise(run: Dict[str, Any]) -> List[Row]:
    return [note("noisy", reason) for reason in run["noise"]]
