from pathlib import Path

import pytest

from fgd.config import get_fgd_cfg
from fgd.distillation.schedule import Schedule, schedule_from_config
from fgd.errors import UserError
from tests.fgd.engine.test_trainer import assert_same_end, begin_second, read_metrics, train
from tests.fgd.training import distilled, training_cfg


def make(factor=1.0, max_iter=10, **node):
    cfg = get_fgd_cfg()
    cfg.SOLVER.MAX_ITER = max_iter
    cfg.MODEL.DISTILLER.FACTOR = factor
    cfg.MODEL.DISTILLER.SCHEDULE.update(node)
    return schedule_from_config(cfg)


def values(schedule, count=11):
    return [schedule.value(i) for i in range(count)]


def test_the_default_is_one_everywhere():
    assert make() == Schedule() and values(make()) == [1.0] * 11
    assert values(make(0.25)) == [0.25] * 11


def test_start_and_stop():
    assert values(make(2.0, START=3, STOP=6)) == [0, 0, 0, 2, 2, 2, 0, 0, 0, 0, 0]


def test_warm_up_then_decay_to_the_end():
    assert values(make(START=1, WARMUP_ITERS=4)) == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    decayed = make(0.5, START=2, WARMUP_ITERS=2, DECAY="linear", STOP=8)
    assert values(decayed) == [0, 0, 0.25, 0.5, 0.5, 0.375, 0.25, 0.125, 0, 0, 0]
    assert values(make(DECAY="linear", max_iter=4), 6) == [1, 0.75, 0.5, 0.25, 0, 0]


def test_it_is_said_in_words():
    assert make().describe() == "factor 1.0, from iteration 0 on"
    text = make(0.5, START=2, WARMUP_ITERS=2, DECAY="linear", STOP=8).describe()
    assert text == "factor 0.5, from iteration 2 to 7, warm-up 2, linear decay to 8"


@pytest.mark.parametrize(
    "node, message",
    [
        ({"START": -1}, "SCHEDULE.START: -1 is not"),
        ({"STOP": -1}, "SCHEDULE.STOP: -1 is not"),
        ({"WARMUP_ITERS": -1}, "SCHEDULE.WARMUP_ITERS: -1 is not"),
        ({"DECAY": "cosine"}, "SCHEDULE.DECAY: 'cosine' is not one of none, linear"),
        ({"START": 10}, "no iteration at the full factor before SOLVER.MAX_ITER 10"),
        ({"START": 4, "STOP": 4}, "before MODEL.DISTILLER.SCHEDULE.STOP 4"),
        ({"START": 2, "STOP": 6, "WARMUP_ITERS": 4}, "SCHEDULE.STOP 6"),
        ({"factor": -1.0}, "MODEL.DISTILLER.FACTOR: -1.0"),
        ({"factor": float("nan")}, "MODEL.DISTILLER.FACTOR: nan"),
        ({"factor": float("inf")}, "MODEL.DISTILLER.FACTOR: inf"),
    ],
)
def test_what_cannot_be_meant_is_refused(node, message):
    with pytest.raises(UserError, match=message):
        make(**node)


@pytest.mark.parametrize("warmup, last", [(4, 0.5), (2, 0.25)])
def test_a_run_resumed_within_the_schedule_is_bit_equal(warmup, last, tmp_path):
    """Interrupted after four of eight steps, within the warm-up or the decay."""
    cfg = distilled(training_cfg(tmp_path), tmp_path)
    cfg.MODEL.DISTILLER.FACTOR = 0.01  # of an untrained teacher
    cfg.MODEL.DISTILLER.SCHEDULE.update(START=2, WARMUP_ITERS=warmup, DECAY="linear")
    train(cfg)
    first = Path(cfg.OUTPUT_DIR)
    begin_second(cfg, tmp_path / "second")
    assert train(cfg, resume=True).start_iter == 4
    assert_same_end(first, tmp_path / "second")
    for folder in (first, tmp_path / "second"):
        assert read_metrics(folder)["distillation_factor"] == 0.01 * last
