import pytest

from fgd.errors import UserError
from fgd.processes import together
from fgd.processes.together import on_main_process


def fail():
    raise UserError("no room")


def test_one_process():
    assert on_main_process(lambda: 3) == 3
    with pytest.raises(UserError, match="no room"):
        on_main_process(fail)


@pytest.mark.parametrize("main", [True, False])
def test_all_ranks_get_the_result_or_the_error_of_the_main_one(main, monkeypatch):
    sent = []

    def all_gather(mine):
        sent.append(mine)
        return [theirs, mine]

    monkeypatch.setattr(together.comm, "is_main_process", lambda: main)
    monkeypatch.setattr(together.comm, "all_gather", all_gather)
    theirs = (5, None)
    assert on_main_process(lambda: 5) == 5
    theirs = (None, "no room")
    with pytest.raises(UserError, match="no room"):
        on_main_process(fail)
    assert sent == ([(5, None), (None, "no room")] if main else [(None, None)] * 2)
