"""Pictures of a study: AP of each seed, AP over latency, losses, and what is distilled."""

import io
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from matplotlib import colormaps
from matplotlib.figure import Figure

from fgd_inputs.names import figure_text

from ..config import load_config
from ..data.datasets import register_from_config
from ..errors import UserError
from ..visualize import loss_figure, picture_figure, record_pictures, rgb_pixels
from ..visualize.run import load_inputs, open_run
from .arms import STUDENT, TEACHER
from .examples import example_figure
from .files import is_finished, write_bytes
from .report import AP_FIGURE, EXAMPLES, KINDS, LATENCY
from .run import Run

_DPI = 110
_NEAR = 0.5  # of the spread of the students: a teacher no farther above them is on their axis


def draw(
    runs: Sequence[Run],
    study: Dict[str, Any],
    shown: Sequence[str],
    cfg: CfgNode,
    output: Path,
    images: int = 2,
) -> Tuple[Dict[str, Path], List[str]]:
    """Caption → PNG in ``output``, of what has finished; and sentences on what could not be drawn.

    Args:
        study: of `__main__.collect`. shown: arms, the best first; of the first one that is there
            detections are shown, and maps on so many test images.
    """
    done = [run for run in runs if is_finished(run)]
    found = {AP_FIGURE: _save(ap_figure(study["arms"]), output / "ap.png")}
    if study["latency"]["points"]:
        figure = latency_figure(study["latency"]["points"])
        found[LATENCY] = _save(figure, output / "latency.png")
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
    missing = []
    compared = [run for run in done if run.arm == STUDENT][:1] + distilled[:1]
    try:
        if compared:
            own = cfg.clone()
            own.OUTPUT_DIR = str(compared[0].folder)  # generated pictures are there
            found[EXAMPLES] = _save(example_figure(compared, own), output / "examples.png")
    except UserError as error:
        missing.append(f"Detections are not shown: {error}")
    try:
        for i, figure in enumerate(distilled_maps(distilled[0], images) if distilled else (), 1):
            caption = f"Distilled maps of a test image ({distilled[0]}), {i} of {images}"
            found[caption] = _save(figure, output / f"maps_{i}.png")
    except UserError as error:
        missing.append(f"Distilled maps are not shown: {error}")
    return found, missing


def ap_figure(rows: Sequence[dict]) -> Figure:
    """A dot per seed and a line at the mean, the best arm first, boxes and masks beside each other.

    The axis is that of the students: a teacher far above them is an arrow with its AP.
    """
    known = [kind for kind in KINDS if any(_means(rows, kind).values())] or ["bbox"]
    most = max(len(_means(rows, kind)) for kind in known)
    size = (7 * len(known), 0.8 + 0.3 * max(1, most))
    figure = Figure(figsize=size, layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(known), squeeze=False)[0], known):
        means = _means(rows, kind)
        each = {row["arm"]: row[kind]["AP"]["each"] for row in rows if row["arm"] in means}
        arms = sorted(means, key=lambda arm: -means[arm])
        low, high = _limits({arm: each[arm] for arm in arms})
        for i, arm in enumerate(arms):
            if means[arm] > high:
                place = {"ha": "right", "va": "center"}
                axis.text(high - 0.01 * (high - low), i, f"{means[arm]:.1f} →", **place)
                continue
            axis.plot(each[arm], [i] * len(each[arm]), "o", color="C0", alpha=0.7, markersize=5)
            axis.plot([means[arm]] * 2, [i - 0.3, i + 0.3], color="black")
        if STUDENT in means:
            axis.axvline(means[STUDENT], color="gray", linestyle=":", zorder=0)
        axis.set_yticks(range(len(arms)), [figure_text(arm) for arm in arms])
        axis.set(xlim=(low, high), ylim=(max(1, len(arms)) - 0.5, -0.5))
        axis.set_xlabel(f"AP, {KINDS[kind]}")
        axis.grid(axis="x", alpha=0.3)
    return figure


def _means(rows: Sequence[dict], kind: str) -> Dict[str, float]:
    found = {row["arm"]: row.get(kind, {}).get("AP", {}).get("mean") for row in rows}
    return {arm: mean for arm, mean in found.items() if mean is not None}


def _limits(each: Dict[str, Sequence[float]]) -> Tuple[float, float]:
    """Of the axis: from the worst to the best student, and a teacher that is not far from them."""
    of_students = [x for arm, values in each.items() for x in values if arm != TEACHER]
    of_teacher = list(each.get(TEACHER, ()))
    values = of_students or of_teacher or [0.0]
    low, high = min(values), max(values)
    if of_teacher and of_teacher[0] - high <= _NEAR * (high - low):
        low, high = min(low, *of_teacher), max(high, *of_teacher)
    margin = max(0.08 * (high - low), 0.5)
    return low - margin, high + margin


def latency_figure(points: Sequence[dict]) -> Figure:
    """AP over milliseconds of `latency.latency`'s points; the legend goes down with AP."""
    figure = Figure(figsize=(8, max(3.5, 0.25 * len(points))), layout="constrained")
    axis, markers = figure.subplots(), {"PyTorch": "o", "graph": "^"}
    for i, x in enumerate(sorted(points, key=lambda x: -x["AP"])):
        label = figure_text(f"{x['name']}{', PyTorch' if x['kind'] == 'PyTorch' else ''}")
        style = {"color": colormaps["tab20"](i % 20), "label": label}
        axis.plot(x["ms"], x["AP"], markers[x["kind"]], **style)
    axis.set(xlabel="ms of one image, median", ylabel="AP, boxes")
    axis.set_xlim(0, 1.1 * max(x["ms"] for x in points))
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7, frameon=False)
    return figure


def distilled_maps(run: Run, images: int) -> List[Figure]:
    """What the method sees of the trained student and its teacher on test images with objects.

    Empty for a method without pictures.

    Raises:
        UserError: checkpoint or teacher are not those of the run, or are gone.
    """
    teacher = run.opts.get("MODEL.DISTILLER.TEACHER.WEIGHTS", "")  # not all methods need one
    distiller, cfg = open_run(run.weights, teacher, hint="bring it back")
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
