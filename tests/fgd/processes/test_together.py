import pytest

from fgd.errors import UserError
from fgd.processes import together
from fgd.processes.launch import launch
from fgd.processes.together import check_alike, on_every_process, on_main_process

from . import ranks


def fail():
    raise UserError("no room")


@pytest.mark.parametrize("run", [on_main_process, on_every_process])
def test_one_process(run):
    assert run(lambda: 3) == 3
    with pytest.raises(UserError, match="no room"):
        run(fail)
    check_alike(fail)  # there is nothing to compare with


@pytest.fixture
def exchanges(monkeypatch):
    """What this process, the second of two, has sent; and what the other one answers, in order."""
    sent, answers = [], []

    def all_gather(mine):
        sent.append(mine)
        return [answers.pop(0), mine]

    monkeypatch.setattr(together.comm, "is_main_process", lambda: False)
    monkeypatch.setattr(together.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(together.comm, "all_gather", all_gather)
    return sent, answers


@pytest.mark.parametrize("main", [True, False])
def test_all_ranks_get_the_result_or_the_error_of_the_main_one(main, exchanges, monkeypatch):
    sent, answers = exchanges
    monkeypatch.setattr(together.comm, "is_main_process", lambda: main)
    answers += [(5, None), (None, (True, "no room"))]
    assert on_main_process(lambda: 5) == 5
    with pytest.raises(UserError, match="no room"):
        on_main_process(fail)
    assert sent == ([(5, None), (None, (True, "no room"))] if main else [(None, None)] * 2)


def test_an_error_of_another_process_is_raised_once_and_not_told_again(exchanges):
    sent, answers = exchanges
    answers.append((None, (True, "no teacher here")))
    with pytest.raises(UserError, match="^no teacher here$"):
        on_every_process(lambda: on_every_process(lambda: on_main_process(fail)))
    assert sent == [(None, None)] and not answers


def test_an_own_error_is_told_once_however_deep_it_is(exchanges):
    sent, answers = exchanges
    answers.append((4, None))
    with pytest.raises(UserError, match="^no room$"):
        on_every_process(lambda: on_every_process(fail))
    assert sent == [(None, (True, "no room"))]


def test_an_error_that_nobody_can_mend_is_said_to_be_of_another_process(exchanges):
    exchanges[1].append((None, (False, "division by zero")))
    with pytest.raises(together.OtherProcessError, match="^process 0: division by zero$"):
        on_every_process(lambda: None)


def test_differences_are_named(exchanges):
    sent, answers = exchanges
    answers.append(({"LR": "0.1", "SEED": "1", "X": "y"}, None))
    with pytest.raises(UserError) as caught:
        check_alike(lambda: {"LR": 0.2, "SEED": 1, "Z": True})
    assert str(caught.value) == (
        "process 1 was started with something else than process 0: LR is 0.2 there, 0.1 here; X is "
        "None there, y here; Z is True there, None here. Start all with one config on the same data"
    )


def test_two_processes_end_together(tmp_path):
    """One fails before an exchange at which the other one waits, or differs from it."""
    assert launch(ranks.fail_apart, (str(tmp_path),), device="cpu", processes=2) == 0
    both = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2)]
    assert both[0] == [
        "UserError: rank 1 has no file",
        "OtherProcessError: process 1: division by zero",
        "UserError: process 1 was started with something else than process 0: LR is 1 there, 0 "
        "here. Start all with one config on the same data",
        "0",
    ]
    assert both[1] == [both[0][0], "ZeroDivisionError: division by zero", *both[0][2:]]
