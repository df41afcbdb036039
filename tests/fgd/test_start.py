"""--starts-as: a run begins with the AP of the run whose weights it takes, or not at all."""

import json

import pytest
import torch

from fgd import cli
from tests.fgd.doctor.clinic import student_cfg, train_teacher
from tests.fgd.training import assert_equal


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Config of two steps from weights that detect everything, and the results.json of these."""
    folder = tmp_path_factory.mktemp("start")
    cfg = student_cfg(folder)
    cfg.MODEL.FPN.OUT_CHANNELS = 24  # as the teacher of the tests of the doctor
    cfg.MODEL.WEIGHTS = str(train_teacher(folder))
    config = folder / "config.yaml"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # DATASETS.JSON names them
    config.write_text(cfg.dump())
    words = ["--config-file", str(config), "OUTPUT_DIR", str(folder / "before")]
    assert cli.main(["--eval-only", *words]) == 0
    return config, folder / "before" / "results.json"


def test_a_run_that_starts_so_trains_as_without_the_question(trained, tmp_path):
    config, results = trained
    expected = json.loads(results.read_text())["bbox"]
    assert expected["AP"] > 20, "vacuous: it must detect something"
    for name, words in (("asked", ["--starts-as", str(results)]), ("plain", [])):
        command = [*words, "--config-file", str(config), "OUTPUT_DIR", str(tmp_path / name)]
        assert cli.main(command) == 0
    start = json.loads((tmp_path / "asked" / "start.json").read_text())
    assert start["iteration"] == 0 and start["bbox"]["AP"] == pytest.approx(expected["AP"])
    assert not (tmp_path / "plain" / "start.json").exists()
    asked, plain = (
        torch.load(tmp_path / x / "model_final.pth", weights_only=True) for x in ("asked", "plain")
    )
    for key in ("model", "rng", "iteration"):  # evaluating first leaves no trace
        assert_equal(asked[key], plain[key], key)


def test_another_start_stops_it_before_step_one(trained, tmp_path, capfd):
    config, results = trained
    content = json.loads(results.read_text())
    content["bbox"]["AP"] -= 1
    other = tmp_path / "results.json"
    other.write_text(json.dumps(content))
    out = tmp_path / "out"
    words = ["--config-file", str(config), "OUTPUT_DIR", str(out)]
    assert cli.main(["--starts-as", str(other), *words]) == 2
    assert "error: --starts-as: this run starts with bbox AP" in capfd.readouterr().err
    assert (out / "start.json").exists() and not list(out.glob("*.pth"))
    # A resumed run has started already: nothing is evaluated before it goes on.
    assert cli.main(words) == 0
    (out / "start.json").unlink()
    assert cli.main(["--resume", "--starts-as", str(other), *words]) == 0
    assert not (out / "start.json").exists()


@pytest.mark.parametrize("other", ["--eval-only", "--doctor"])
def test_it_belongs_to_a_training(trained, capfd, other):
    config, results = trained
    assert cli.main([other, "--starts-as", str(results), "--config-file", str(config)]) == 2
    assert "error: --starts-as belongs to a training" in capfd.readouterr().err
