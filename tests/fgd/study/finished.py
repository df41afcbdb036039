"""Folders of runs as a training leaves them."""

import json


def finish(run, ap=50.0, minutes=2.0, iterations=600, step=0.5, evaluated=None, **more):
    """results.json with this box AP, minutes.json, and metrics.json of three lines."""
    run.folder.mkdir(parents=True, exist_ok=True)
    box = {"AP": ap, "AP50": ap + 20, "AP75": ap - 5, "APs": None, "APm": ap, "APl": ap, **more}
    result = {"iteration": iterations, "bbox": {**box, "AP-disc": ap + 1}}
    result |= {} if evaluated is None else {"evaluated": evaluated}
    (run.folder / "results.json").write_text(json.dumps(result))
    (run.folder / "minutes.json").write_text(json.dumps(minutes))
    lines = [{"iteration": 20 * i, "total_loss": 3 - i, "time": step} for i in range(3)]
    (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
