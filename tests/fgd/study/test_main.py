import pytest

from fgd.config import load_config
from fgd.study.__main__ import main
from fgd.study.pictures import labelled_inputs
from tests.fgd.training import distilled, training_cfg


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A distillation config of two steps, with a teacher that is there."""
    folder = tmp_path_factory.mktemp("study")
    opts = ("SOLVER.MAX_ITER", 2, "DOCTOR.BRIEF", False)  # its teacher is random
    cfg = distilled(training_cfg(folder, opts=opts), folder)
    (folder / "fgd.yaml").write_text(cfg.dump())
    return folder / "fgd.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,x"], "'0,x' is not numbers"),
        (["--seeds", "1,1"], "names a seed twice"),
        (["--arms", "magic"], "magic unknown"),
        (["--factor", "FGD"], "--factor: 'FGD' is not NAME=NUMBER"),
        (["--arms", "stages"], "stages needs --stages"),
        (["--stages", "none.yaml"], "--stages: none.yaml alone is no chain"),
        (["SOLVER.MAX_ITER"], "pairs of KEY VALUE"),
        (["--report"], "no run has finished"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(config_file, tmp_path, capsys, words, message):
    assert main(["--config-file", str(config_file), "--output", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_test_images_are_mapped_at_the_size_of_the_test_without_a_flip(config_file):
    cfg = load_config(str(config_file), ["INPUT.MIN_SIZE_TEST", "32", "INPUT.MAX_SIZE_TEST", "48"])
    inputs = labelled_inputs(cfg, 2)
    assert [tuple(x["image"].shape[-2:]) for x in inputs] == [(32, 48), (48, 32)]
    first = inputs[0]["instances"].gt_boxes.tensor[0].tolist()
    assert first == [2, 3, 14, 18]  # [4, 6, 28, 36] of a picture of twice the size
    assert labelled_inputs(cfg, 0) == []
