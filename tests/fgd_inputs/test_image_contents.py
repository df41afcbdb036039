"""Files by content: against every byte of every file, and for what is told apart cheaply."""

import os
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd_inputs import image_contents
from fgd_inputs.image_contents import equal_files, look_up, set_digest

# Few sizes and beginnings, so that files are often alike, and differ in one byte somewhere.
CONTENTS = st.builds(
    lambda size, where: bytearray(size) if where is None else _changed(size, where),
    st.sampled_from([0, 1, 5000, 30000]),
    st.none() | st.integers(0, 29999),
)


def _changed(size, where):
    content = bytearray(size)
    if where < size:
        content[where] = 1
    return content


def write(folder, contents):
    paths = [os.path.join(folder, f"{i}.png") for i in range(len(contents))]
    for path, content in zip(paths, contents):
        with open(path, "wb") as file:
            file.write(content)
    return look_up(paths)


@settings(max_examples=60, deadline=None)
@given(st.lists(CONTENTS, max_size=5), st.lists(CONTENTS, max_size=5))
def test_equal_files_are_those_of_the_same_bytes(ours, theirs):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        found = equal_files(write(one, ours), write(two, theirs))
    assert set(found) == {i for i, x in enumerate(ours) if len(x) and x in theirs}
    assert all(theirs[j] == ours[i] for i, j in found.items())


def test_one_file_under_two_names_is_not_read(tmp_path, monkeypatch):
    files = write(tmp_path, [b"abc", b"def"])
    (tmp_path / "link.png").symlink_to(tmp_path / "1.png")
    os.link(tmp_path / "0.png", tmp_path / "hard.png")
    monkeypatch.setattr(image_contents, "_hashed", None)
    names = look_up([str(tmp_path / name) for name in ("link.png", "hard.png")])
    assert equal_files(names, files) == {0: 1, 1: 0}


def test_beyond_a_gibibyte_three_places_decide(tmp_path, monkeypatch):
    (tmp_path / "two").mkdir()
    ours = write(tmp_path, [_changed(30000, 7000)])  # between the places that are looked at
    theirs = write(tmp_path / "two", [bytes(30000)])
    assert equal_files(ours, theirs) == {}
    monkeypatch.setattr(image_contents, "_COMPARED", 29999)
    assert equal_files(ours, theirs) == {0: 0}


def test_what_is_no_file_equals_nothing_but_itself(tmp_path):
    names = ["https://x/a.png", str(tmp_path), "nul\0.png", "gone.png"]
    files = look_up(names)
    assert [file.size for file in files] == [-1] * 4
    assert equal_files(files[1:2], files[2:]) == {}
    assert set_digest(files) == set_digest(look_up(names))


def test_a_digest_is_of_content_and_order_not_of_names_places_and_times(tmp_path):
    for name in ("two", "other", "turned"):
        (tmp_path / name).mkdir()
    digest = set_digest(write(tmp_path, [b"abc", b"def", b"g"]))
    moved = write(tmp_path / "two", [b"abc", b"def", b"g"])
    os.utime(moved[0].path, (1, 1))
    assert set_digest(moved) == digest
    assert set_digest(write(tmp_path / "other", [b"abc", b"deX", b"g"])) != digest
    assert set_digest(write(tmp_path / "turned", [b"def", b"abc", b"g"])) != digest


@pytest.mark.parametrize(("changed", "seen"), [(0, True), (1, False), (2, True)])
def test_of_a_large_set_evenly_spaced_files_are_read_and_all_sizes(
    tmp_path, monkeypatch, changed, seen
):
    monkeypatch.setattr(image_contents, "_READ", 6)  # bytes: every second one of these
    (tmp_path / "two").mkdir()
    contents = [b"abc", b"def", b"ghi"]
    digest = set_digest(write(tmp_path, contents))
    contents[changed] = b"xyz"
    assert (set_digest(write(tmp_path / "two", contents)) != digest) is seen
    contents[changed] = b"other size"
    assert set_digest(write(tmp_path / "two", contents)) != digest
