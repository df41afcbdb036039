import copy
from functools import cached_property

import numpy as np
import pytest
import torch

from fgd.bench.memory import trace
from fgd.bench.per_method import (
    TEACHER,
    Memory,
    TeacherForward,
    compute,
    measure_memory,
    method_row,
    record,
)
from fgd.bench.workload import build_workload
from fgd.distillation.teacher import FrozenTeacher
from fgd.timing import Times

from .conftest import pair_cfg

SIZE = (64, 96)


@pytest.fixture(scope="module")
def work(toys, tmp_path_factory):
    """Of an R-CNN, with methods "Maps", "Logits" and "Trained"."""
    cfg = pair_cfg(tmp_path_factory.mktemp("pair"), "GeneralizedRCNN")
    return build_workload(cfg, SIZE, 1, 2, ["Maps", "Logits", "Trained"], variants=False)


def test_the_teachers_forward_is_what_a_step_asks_of_it(work, monkeypatch):
    asked = []
    for name in ("look", "regions"):
        method = getattr(FrozenTeacher, name)

        def spy(self, *args, name=name, method=method):
            asked.append((name, self, torch.is_grad_enabled()))
            return method(self, *args)

        monkeypatch.setattr(FrozenTeacher, name, spy)
    for method, names in {"Maps": ["look"], "Logits": ["look", "regions"]}.items():
        distiller = work.distillers[method]
        own = distiller.teacher
        forward = record(distiller, work.batch, own)
        assert distiller.teacher is own
        assert forward.title == (TEACHER if method == "Maps" else f"{TEACHER} with roi_heads")
        asked.clear()
        forward()
        assert asked == [(name, own, False) for name in names]


def test_another_teacher_can_take_its_place(work):
    distiller, ran = work.distillers["Logits"], []
    own, other = distiller.teacher, copy.copy(distiller.teacher)
    other.backbone = copy.deepcopy(own.backbone)
    other.backbone.register_forward_hook(lambda *call: ran.append(call[0]))
    forward = record(distiller, work.batch, other)
    assert distiller.teacher is own and ran == [other.backbone]
    forward()
    assert ran == [other.backbone] * 2


def test_a_teacher_that_fails_is_put_back(work, monkeypatch):
    distiller = work.distillers["Maps"]
    own = distiller.teacher
    monkeypatch.setattr(own, "look", None)
    with pytest.raises(TypeError):
        record(distiller, work.batch, own)
    assert distiller.teacher is own


def test_memory_is_what_the_forward_leaves_and_the_step_reaches(work):
    distiller = work.distillers["Trained"]
    big = []

    def step():
        big.append(torch.empty(3_000_000, dtype=torch.uint8))
        big.clear()

    own = measure_memory(step, distiller, work.batch, amp=False)
    plain = measure_memory(step, work.student, work.batch, amp=False)
    assert own.peak == plain.peak == 3_000_000
    assert own.held - plain.held == pytest.approx(4 * 500 * 400, abs=2000)
    assert own.unit == (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3) * 16 * 4 and plain.unit == 0
    assert distiller.watch is None
    again = measure_memory(step, distiller, work.batch, amp=False)
    assert again.held == own.held  # the same proposals
    assert trace(lambda: None, torch.device("cpu"))[1] == (0, 0)


class _Lazy:
    """As an answer of a teacher whose parts are made on demand."""

    made = ()

    @property
    def first(self):
        self.made += ("first",)
        return {"p3": torch.zeros(())}

    @cached_property
    def second(self):
        self.made += ("second",)
        return [None, 3]


def test_what_is_made_on_demand_is_made():
    lazy = [_Lazy() for _ in range(3)]
    compute(({"p3": lazy[0]}, [lazy[1], torch.zeros(2)], None))
    assert [x.made for x in lazy] == [("first", "second")] * 2 + [()]


def test_figures_of_a_method_are_beyond_the_students(work):
    times = [Times(np.array(x), np.array(x)) for x in ([3.0, 4.0], [5.0, 9.0], [1.0, 2.0])]
    memory = Memory(peak=100, held=40), Memory(peak=175, held=90, unit=25)
    row = method_row("Maps", work.distillers["Maps"], times, memory)
    assert (row["peak_over_student_bytes"], row["held_bytes"], row["held_u"]) == (75, 50, 2.0)
    assert (row["over_parts"], row["added_ms"]) == (1.375, 2000.0)  # 5/4 and 9/6; 1 and 3 s
    assert row["goal"]["value"] == 1.375 and row["no_goal"] == "" and row["parameters"] == 0
    row = method_row("Trained", work.distillers["Trained"], times, memory)
    assert row["goal"] is None and row["no_goal"] and row["parameters"] == 25


def test_more_than_one_look_is_another_forward(work):
    teacher, seen = work.distillers["Maps"].teacher, []
    look = ("look", lambda: seen.append(1))
    assert TeacherForward(teacher, [look]).title == TEACHER
    forward = TeacherForward(teacher, [look, look])
    forward()
    assert forward.title == f"{TEACHER}, 2 looks" and len(seen) == 2
