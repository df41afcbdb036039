import logging
import os

import pytest
import torch
from torch import nn

from fgd.engine.checkpoint import TrainingCheckpointer
from fgd.engine.run_folder import (
    check_unused,
    config_kept,
    delete_old_checkpoints,
    delete_run,
    newest_checkpoint,
)
from fgd.errors import UserError

from .test_checkpoint import HEADER, Trainer


@pytest.fixture
def folder(tmp_path):
    """A run with checkpoints of iterations 1, 3 and 5; the last is named."""
    saver = TrainingCheckpointer(nn.Linear(8, 8), str(tmp_path), header=HEADER, trainer=Trainer())
    for iteration in (1, 3, 5):
        saver.save(f"model_{iteration:07d}", iteration=iteration)
    return tmp_path


def newest(folder):
    found = newest_checkpoint(str(folder))
    return found and (os.path.basename(found[0]), found[1]["iteration"])


def test_the_named_one_is_taken_without_a_word(folder, caplog):
    assert newest(folder) == ("model_0000005.pth", 5)
    (folder / "last_checkpoint").write_text("model_0000003.pth\n")  # as a user may
    assert newest(folder) == ("model_0000003.pth", 3)
    assert "--resume" not in caplog.text


def test_a_new_folder_has_none(tmp_path):
    assert newest(tmp_path) is None and newest(tmp_path / "missing") is None
    (tmp_path / "log.txt").write_text("x")
    (tmp_path / ".tmp_fgd_1_model_final.pth").write_bytes(b"half")
    assert newest(tmp_path) is None


POINTERS = {
    "missing": (None, "last_checkpoint is missing"),
    "empty": ("", "names '', which is not in that folder"),
    "stale": ("model_0000099.pth", "names 'model_0000099.pth', which is not in"),
    "outside": ("../outside.pth", "names '../outside.pth', which is not in"),
    "absolute": ("{folder}/model_0000001.pth", "which is not in that folder"),
    "binary": ("\0\1\2", "which is not in that folder"),
}


@pytest.mark.parametrize("case", POINTERS)
def test_a_bad_pointer_is_explained_and_the_newest_taken(case, folder, caplog):
    text, message = POINTERS[case]
    (folder.parent / "outside.pth").write_bytes((folder / "model_0000001.pth").read_bytes())
    (folder / "last_checkpoint").unlink()
    if text is not None:
        (folder / "last_checkpoint").write_text(text.format(folder=folder))
    assert newest(folder) == ("model_0000005.pth", 5)
    assert message in caplog.text
    assert "model_0000005.pth (iteration 5), the newest checkpoint that is whole" in caplog.text


def flip(path, place=1000):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-500]),
    "empty": lambda path: path.write_bytes(b""),
    "html": lambda path: path.write_text("<!DOCTYPE html><html>Sign in</html>"),
    "flipped": flip,
    "unsealed": lambda path: flip(path, len(path.read_bytes()) - 70),
    "foreign": lambda path: torch.save({"model": {"w": torch.ones(1)}, "iteration": 9}, path),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(case, folder, caplog):
    DAMAGE[case](folder / "model_0000005.pth")
    assert newest(folder) == ("model_0000003.pth", 3)
    assert "not from" in caplog.text and "model_0000005.pth" in caplog.text
    assert "Continuing from" in caplog.text and "(iteration 3), the newest" in caplog.text
    DAMAGE[case](folder / "model_0000003.pth")
    assert newest(folder) == ("model_0000001.pth", 1)


def test_without_any_whole_one_all_are_named(folder):
    for i, damage in zip((1, 3, 5), ("html", "truncated", "flipped"), strict=True):
        DAMAGE[damage](folder / f"model_{i:07d}.pth")
    with pytest.raises(UserError) as error:
        newest(folder)
    text = str(error.value)
    assert error.value.exit_code == 2 and "\n" not in text
    for i, fault in ((1, "this is a web page"), (3, "damaged"), (5, "damaged")):
        assert f"model_{i:07d}.pth: {fault}" in text
    assert "--overwrite" in text


def test_a_pointer_to_nothing_does_not_start_anew(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    with pytest.raises(UserError, match="names 'model_0000005.pth', which is not in that folder"):
        newest(tmp_path)


def test_newest_is_by_iteration_not_by_time(folder):
    (folder / "last_checkpoint").unlink()
    os.utime(folder / "model_0000001.pth", (2e9, 2e9))
    assert newest(folder) == ("model_0000005.pth", 5)


def test_files_from_before_the_checksum_are_still_resumed(folder, caplog):
    caplog.set_level(logging.INFO, "fgd")
    data = torch.load(folder / "model_0000005.pth", weights_only=True)
    del data["checksum"]
    torch.save(data, folder / "model_0000005.pth")
    assert newest(folder) == ("model_0000005.pth", 5)
    assert "is from before checkpoints had a SHA-256" in caplog.text


# What is deleted


def names(folder):
    return sorted(x.name for x in folder.glob("*.pth"))


def test_the_last_ones_are_kept(folder):
    for other in ("model_best", "model_final", "teacher"):
        (folder / f"{other}.pth").write_bytes((folder / "model_0000001.pth").read_bytes())
    everything = names(folder)
    for keep in (0, 3):
        delete_old_checkpoints(str(folder), "model_0000005.pth", keep)
        assert names(folder) == everything
    delete_old_checkpoints(str(folder), "model_0000005.pth", 1)
    kept = ["model_0000005.pth", "model_best.pth", "model_final.pth", "teacher.pth"]
    assert names(folder) == kept


def test_nothing_is_deleted_if_the_new_one_reads_back_wrong(folder, caplog):
    flip(folder / "model_0000005.pth")
    delete_old_checkpoints(str(folder), "model_0000005.pth", 1)
    assert len(names(folder)) == 3 and "No old checkpoint is deleted" in caplog.text


def test_a_future_that_was_taken_back_does_not_push_out_the_present(folder):
    """Resumed from 1 because 3 and 5 are damaged: they must not count as the ones to keep."""
    flip(folder / "model_0000003.pth")
    flip(folder / "model_0000005.pth")
    source = (folder / "model_0000001.pth").read_bytes()
    (folder / "model_0000002.pth").write_bytes(source)
    delete_old_checkpoints(str(folder), "model_0000002.pth", 1)
    assert names(folder) == [f"model_000000{i}.pth" for i in (2, 3, 5)]
    assert newest(folder) == ("model_0000002.pth", 1)  # the content is a copy


def test_the_folder_of_another_run_is_recognised_and_only_its_files_deleted(folder, tmp_path):
    with pytest.raises(UserError, match=r"\(last_checkpoint, model_0000001.pth, .*, \.\.\.\)"):
        check_unused(str(folder))
    for name in ("metrics.json", "results.json", "teacher.pth", "model_r50.pth", "log.txt"):
        (folder / name).write_text("x")
    delete_run(str(folder))
    assert sorted(os.listdir(folder)) == ["log.txt", "model_r50.pth", "teacher.pth"]
    check_unused(str(folder))
    check_unused(str(folder / "missing"))
    delete_run(str(folder))
    assert len(os.listdir(folder)) == 3


def test_the_config_of_a_refused_run_is_taken_back(tmp_path):
    path = tmp_path / "config.yaml"
    for accepted, left in ((False, "old"), (True, "new")):
        path.write_text("old")
        with pytest.raises(UserError):
            with config_kept(str(tmp_path)) as accept:
                path.write_text("new")
                if accepted:
                    accept()
                raise UserError("refused, or failed later")
        assert path.read_text() == left
    path.unlink()
    with pytest.raises(UserError), config_kept(str(tmp_path)):
        path.write_text("new")  # nothing to protect
        raise UserError("refused")
    assert path.exists()
