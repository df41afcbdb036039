"""What the lock of a folder says; that it ends with its process is tested in test_lock.py."""

import os

import pytest

from fgd_inputs.errors import UserError
from fgd_inputs.folder_lock import locked


def enter(folder, said=None):
    said = [] if said is None else said
    return locked(str(folder), "--output", "run", said.append, said.append)


def test_one_process_takes_a_folder_once(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with enter(tmp_path):
        for _ in range(2):
            with pytest.raises(UserError) as error:
                with enter(tmp_path / "link"):
                    pass
        assert str(error.value) == (
            f"--output {tmp_path / 'link'} is in use by another run (this process). Wait for it, "
            "stop it, or choose another --output"
        )
    with enter(tmp_path):
        pass


def test_a_run_that_fails_leaves_the_lock_in_order(tmp_path):
    said = []
    with pytest.raises(KeyError), enter(tmp_path):
        raise KeyError
    with enter(tmp_path, said):
        pass
    assert said == [] and (tmp_path / ".fgd_lock").read_bytes() == b""


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"cannot write .*\.fgd_lock: No space left on device"):
        with enter(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / ".fgd_lock").mkdir()
    with pytest.raises(UserError, match=f"--output {tmp_path}: cannot write there"):
        with enter(tmp_path):
            pass


@pytest.mark.parametrize("text", [b"{", b'{"pid": []}', b"[" * 100_000, b"\xff"], ids=len)
def test_rubbish_in_the_lock_does_not_matter(tmp_path, text):
    (tmp_path / ".fgd_lock").write_bytes(text)
    said = []
    with enter(tmp_path, said):
        pass
    assert said == []
