"""tools/versions.py: a pair passes, fails or is not run, and says so; the others still run."""

import json
import platform
import sys

import pytest

from tools import versions


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What would be run; a word in ``failing`` makes its command fail."""
    done, failing = [], set()

    def run(log, *words, python):
        done.append(" ".join(map(str, (python, *words))))
        if "venv" in words:
            (words[-1] / "bin").mkdir(parents=True)
        if failing & set(words):
            raise versions.Failed(f"{words[1]}: exit code 1")

    monkeypatch.setattr(versions, "run", run)
    monkeypatch.setattr(versions, "find_python", lambda v: None if v == "3.9" else f"python{v}")
    found = {"python": "3.12.1", "torch": "2.9.1", "torchvision": "0.24.1"}
    monkeypatch.setattr(versions, "versions", lambda python: found)
    return done, failing


def test_torch_comes_first_and_stays(commands, tmp_path):
    done, _ = commands
    assert versions.main(["--output", str(tmp_path), "--pairs", "3.12:2.9", "3.13:newest"]) == 0
    own = str(tmp_path / "3.12_2.9" / "venv" / "bin" / "python")
    assert done[0] == f"python3.12 -m venv --clear {tmp_path / '3.12_2.9' / 'venv'}"
    assert done[1] == f"{own} -m pip install -q torchvision torch==2.9.*"
    assert done[2].startswith(f"{own} -m pip install -q -c {tmp_path / '3.12_2.9' / 'venv'}")
    assert done[3].startswith(f"{own} -m pytest tests/")
    assert done[4].startswith(f"{own} -m deploy.matrix --columns static")
    assert done[6].endswith("-m pip install -q torchvision")
    assert not list(tmp_path.glob("*/venv"))  # gigabytes each
    page = (tmp_path / "versions.md").read_text()
    assert page.count("| 3.12.1   | 2.9.1   | 0.24.1") == 2 and page.count("passed") == 2


def test_a_failure_and_a_missing_python_are_said(commands, tmp_path, capsys):
    _, failing = commands
    failing.add("deploy.matrix")
    assert versions.main(["--output", str(tmp_path), "--pairs", "3.9:2.9", "3.12:2.9"]) == 1
    rows = json.loads((tmp_path / "versions.json").read_text())
    outcomes = ["not run: there is no python3.9", "deploy.matrix: exit code 1"]
    assert [row["outcome"] for row in rows] == outcomes
    assert "| 3.9      | 2.9     |" in (tmp_path / "versions.md").read_text()
    assert "3.9:2.9: not run: there is no python3.9" in capsys.readouterr().out


def test_the_environment_is_asked_for_its_versions():
    found = versions.versions(sys.executable)
    assert found["python"] == platform.python_version() and found["torch"].startswith("2.")
    assert versions.find_python("0.1") is None


@pytest.mark.parametrize("pair", ["3.12", "3.12:2.9:1", "3:2.9", "3.12:latest", "a.b:2.9"])
def test_what_is_no_pair_is_refused(pair, capsys):
    with pytest.raises(SystemExit):
        versions.main(["--pairs", pair])
    assert f"invalid pair value: '{pair}'" in capsys.readouterr().err


def test_the_tests_it_names_exist():
    assert all((versions.ROOT / name).exists() for name in versions.TESTS)
