import json
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from fgd.engine.history import ContinueMetrics, repair_metrics


def lines(*iterations):
    return "".join(json.dumps({"iteration": i, "loss": i / 2}) + "\n" for i in iterations)


def test_lines_after_the_checkpoint_go_and_those_cut_off(tmp_path):
    path = tmp_path / "metrics.json"
    text = lines(19, 17, 39)
    for rest in ("", '{"iteration": 5', '{"loss": 1}\n', "[1]\n\n", "\0\0\0"):
        path.write_text(text + rest)
        assert repair_metrics(str(path), 19) == [19, 17]
        assert path.read_text() == lines(19, 17)
    path.write_text('{"iteration": 5' + lines(19))  # from before there was a repair
    assert repair_metrics(str(path), 39) == [] and path.read_text() == ""


def test_a_whole_file_is_not_touched(tmp_path):
    path = tmp_path / "metrics.json"
    assert repair_metrics(str(path), 5) == []
    assert not path.exists()
    path.write_text(lines(1, 2))
    before = path.stat().st_mtime_ns
    assert repair_metrics(str(path), 2) == [1, 2]
    assert path.stat().st_mtime_ns == before
    assert repair_metrics(str(path), -1) == [] and path.read_text() == ""


def test_a_writer_that_has_it_open_goes_on_at_its_end(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(lines(1, 2, 3))
    with open(path, "a") as writer:
        repair_metrics(str(path), 1)
        writer.write(lines(4))
    assert path.read_text() == lines(1, 4)


@pytest.mark.parametrize("written, left", [([], {"AP", "loss"}), ([17], set()), ([11], {"loss"})])
def test_only_what_is_still_to_be_written_is_left_to_the_writers(written, left):
    """With a line of iteration 17, the AP of 11 was written or, by then, replaced by a newer."""
    hook = ContinueMetrics()
    smoothed = {"loss": [[1.0, 16], [2.0, 17]]}
    hook.load_state_dict({"smoothed": smoothed, "single": {"AP": [[5.0, 11]]}})
    hook.written = written
    with EventStorage(18) as storage:
        hook.trainer = SimpleNamespace(storage=storage, iter=18, _hooks=[])
        hook.before_train()
        assert storage.latest().keys() == left and storage.iter == 18
        assert storage.history("loss").values() == [(1.0, 16), (2.0, 17)]
