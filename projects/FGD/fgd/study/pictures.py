"""Pictures of a study: AP of each seed, losses, and what is distilled."""

import io
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from matplotlib.figure import Figure

from fgd_inputs.names import figure_text

from ..config import load_config
from ..data.datasets import register_from_config
from ..errors import UserError
from ..visualize import loss_figure, picture_figure, record_pictures, rgb_pixels
from ..visualize.run import load_inputs, open_run
from .arms import TEACHER
from .files import is_finished, write_bytes
from .run import Run

_DPI = 110


def draw(
    runs: Sequence[Run], rows: Sequence[dict], shown: Sequence[str], output: Path, images: int = 2
) -> Tuple[Dict[str, Path], List[str]]:
    """Caption → PNG in ``output``, of what has finished; and sentences on what could not be drawn.

    Args:
        rows: of `summarize`. shown: arms, of the first one that is there maps are shown, on so
            many test images.
    """
    done = [run for run in runs if is_finished(run)]
    found = {"AP of each seed, boxes": _save(ap_figure(rows), output / "ap.png")}
    first = min((run.seed for run in done if run.arm != TEACHER), default=0)
    curves = {
        run.arm: run.folder / "metrics.json"
        for run in done
        if run.arm != TEACHER and run.seed == first and (run.folder / "metrics.json").exists()
    }
    if curves:
        caption = f"Losses over the iterations, seed {first}"
        figure = loss_figure(curves, ("total_loss", "loss_", "distill/"))
        found[caption] = _save(figure, output / "losses.png")
    distilled = [run for arm in shown for run in done if run.arm == arm]
    try:
        for i, figure in enumerate(distilled_maps(distilled[0], images) if distilled else (), 1):
            caption = f"Distilled maps of a test image ({distilled[0]}), {i} of {images}"
            found[caption] = _save(figure, output / f"maps_{i}.png")
    except UserError as error:
        return found, [f"Distilled maps are not shown: {error}"]
    return found, []


def ap_figure(rows: Sequence[dict]) -> Figure:
    """A dot per seed and a line at the mean, arm by arm."""
    rows = [row for row in rows if row.get("bbox", {}).get("AP", {}).get("mean") is not None]
    figure = Figure(figsize=(7, 0.6 + 0.4 * max(1, len(rows))), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(rows):
        each = row["bbox"]["AP"]["each"]
        axis.plot(each, [i] * len(each), "o", color="C0", alpha=0.7)
        axis.plot([row["bbox"]["AP"]["mean"]] * 2, [i - 0.3, i + 0.3], color="black")
    axis.set_yticks(range(len(rows)), [figure_text(row["arm"]) for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("AP")
    axis.grid(axis="x", alpha=0.3)
    return figure


def distilled_maps(run: Run, images: int) -> List[Figure]:
    """What the method sees of the trained student and its teacher on test images with objects.

    Empty for a method without pictures.

    Raises:
        UserError: checkpoint or teacher are not those of the run, or are gone.
    """
    teacher = run.opts.get("MODEL.DISTILLER.TEACHER.WEIGHTS", "")  # not all methods need one
    distiller, cfg = open_run(run.weights, teacher)
    options = [word for pair in run.opts.items() for word in pair]  # the data may have moved
    cfg.DATASETS = load_config(run.config_file, options).DATASETS
    cfg.OUTPUT_DIR = str(run.folder)  # generated pictures are there
    figures = []
    for inputs in labelled_inputs(cfg, images):
        recorded = record_pictures(distiller, inputs)
        if recorded.pictures:
            image = rgb_pixels(inputs["image"], cfg.INPUT.FORMAT)
            drawn = recorded.boxes, recorded.pictures, recorded.padded_size
            figures.append(picture_figure(image, *drawn))
    return figures


def labelled_inputs(cfg: CfgNode, images: int) -> List[dict]:
    """Mapped dicts of so many test images with objects, evenly spaced, at the size of the test."""
    cfg = register_from_config(cfg, ("TEST",))
    records = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=True)
    chosen = records[:: max(1, len(records) // images)][:images] if images else []
    return [load_inputs(record["file_name"], cfg, record) for record in chosen]


def _save(figure: Figure, path: Path) -> Path:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    write_bytes(path, drawn.getvalue())
    return path
