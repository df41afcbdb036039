"""What `python deploy/predict.py` does with many files: journal, detections.json and pictures.

numpy and Pillow only.
"""

import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from deploy.errors import UserError
from deploy.files import content_sha256, make_folder, write_atomically, write_json
from deploy.serving.coco_results import CocoIds
from deploy.serving.detector import Detections, Detector
from deploy.serving.draw import draw_detections
from deploy.serving.journal import Journal, Note
from deploy.serving.paste import encode_rle
from deploy.serving.progress import show_progress
from fgd_inputs.folder_lock import locked
from fgd_inputs.names import one_line

_LONGEST_STEM = 200  # bytes of a picture's name: file systems take 255


def predict(
    detector: Detector,
    files: Sequence[Path],
    output,
    batch_size: int = 1,
    pictures: bool = True,
    resume: bool = False,
    ids: Optional[CocoIds] = None,
) -> Dict:
    """Detect objects in `files`, write `output`/detections.json and `output`/pictures/.

    Args:
        resume: keep what `output`/detections.jsonl says is finished.
        ids: write `output`/coco_results.json by them, too.
    Returns:
        What the JSON holds: "model", "graph_sha256" (None on a server), "classes", "min_score",
        "images" (a dict per file: file, height, width, boxes, scores, labels, class_names, shrunk,
        picture; of a model with masks segmentations, COCO's RLE) and "failed" (file, error), all in
        the order of `files`.
    Raises:
        UserError: `output` cannot be written, is in use by another run, or holds the journal of
            another model or other options. A bad image does not raise.
    """
    output = Path(output)
    make_folder(output)
    with locked(str(output), "--output", "run of predict.py", say, say):
        images, failed = _detect_all(detector, files, output, batch_size, pictures, resume)
        report = {
            "model": detector.name,
            "graph_sha256": getattr(detector, "sha256", None),
            "classes": detector.spec.classes,
            "min_score": detector.min_score,
            "images": images,
            "failed": failed,
        }
        write_json(output / "detections.json", report)
        if ids:
            ids.write(output, images)
    return report


def _detect_all(detector, files, output, batch_size, pictures, resume) -> Tuple[List, List]:
    """The entries of "images" and of "failed"."""
    settings = {
        "model": detector.identity,
        "score": detector.min_score,
        "batch_size": batch_size,
        "pictures": pictures,
    }
    journal = Journal(output / "detections.jsonl", settings, resume)
    names = picture_names(files, output) if pictures else [None] * len(files)
    images: List[Dict[str, Any]] = []
    failed: List[Dict[str, Any]] = []
    for start in range(0, len(files), batch_size):
        # whole batches: an image that ran in other company could score slightly differently
        batch = list(zip(files, names))[start : start + batch_size]
        made_of = _made_of([file for file, _ in batch])
        entries = [journal.entry(file, made_of, name) for file, name in batch]
        if None in entries:
            results = detector.detect_each([file for file, _ in batch])
            entries = [
                _result(detector, file, *result, output, name)
                for (file, name), result in zip(batch, results, strict=True)
            ]
            journal.add(
                Note(file, made_of, name, entry)
                for (file, name), entry in zip(batch, entries)
                if "error" not in entry
            )
        for entry in entries:
            (failed if "error" in entry else images).append(entry)
        show_progress(start + len(batch), len(files))
    return images, failed


def _made_of(batch: Sequence[Path]) -> str:
    """One digest of all images in a batch. Taken before they are read: one that is replaced
    meanwhile counts as another afterwards."""
    contents = " ".join(content_sha256(file) or "none" for file in batch)
    return hashlib.sha256(contents.encode()).hexdigest()


def _result(detector, file, array, result, output, picture) -> Dict[str, Any]:
    """An entry of "images" or "failed"; writes the picture, or removes the one of before."""
    if isinstance(result, UserError):
        if picture:
            (output / picture).unlink(missing_ok=True)
        return {"file": str(file), "error": str(result)}
    entry = _entry(file, result, detector.spec.classes)
    if picture:
        _save_picture(output / picture, array, result, detector.spec.classes)
        entry["picture"] = picture
    return entry


def picture_names(files: Sequence[Path], output: Path) -> List[str]:
    """pictures/STEM.jpg for each file, or STEM_2.jpg and so on if that is taken.

    By the names of the files alone, so that a resumed run calls each as a whole one would; none is
    the path of an input.
    """
    taken, names = {path.resolve() for path in files}, []
    for file in files:
        stem = os.fsdecode(os.fsencode(file.stem)[:_LONGEST_STEM])
        name, number = f"pictures/{stem}.jpg", 1
        while (output / name).resolve() in taken:
            number += 1
            name = f"pictures/{stem}_{number}.jpg"
        taken.add((output / name).resolve())
        names.append(name)
    return names


def say(text: str) -> None:
    """A line on stderr."""
    print(one_line(text), file=sys.stderr)


def _entry(file: Path, found: Detections, classes: Sequence[str]) -> Dict:
    entry = {
        "file": str(file),
        "height": found.size[0],
        "width": found.size[1],
        "boxes": [[round(float(x), 3) for x in box] for box in found.boxes],
        "scores": [round(float(score), 6) for score in found.scores],
        "labels": found.labels.tolist(),
        "class_names": [classes[label] for label in found.labels],
        "shrunk": found.shrunk,
    }
    if found.masks is not None:
        entry["segmentations"] = [encode_rle(mask) for mask in found.bitmaps()]
    return entry


def _save_picture(path: Path, image: np.ndarray, found: Detections, classes) -> None:
    picture = draw_detections(
        image, found.boxes, found.labels, classes, found.scores, found.bitmaps()
    )
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    write_atomically(path, buffer.getvalue())
