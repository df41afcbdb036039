from pathlib import Path

import pytest

from fgd.errors import UserError
from fgd.study.arms import ablations, main_arm, study_config
from fgd.study.plan import plan

from .methods import method

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
TEACHER = {"MODEL.DISTILLER.TEACHER.WEIGHTS": "t.pth"}


def test_arms_differ_in_the_distillation_alone(tmp_path):
    arms = ["student", "inherit", "distil", "inherit+distil"]
    runs = plan(CONFIG, "teacher.yaml", arms, [0, 1], tmp_path, {"INPUT.FORMAT": "RGB"})
    assert [str(r) for r in runs[:3]] == ["teacher", "student, seed 0", "student, seed 1"]
    by_name = {str(r): r for r in runs}
    assert len(by_name) == len(runs) == 9 == len({r.folder for r in runs})
    student, distil = by_name["student, seed 0"], by_name["distil, seed 1"]
    assert by_name["teacher"].opts == {"INPUT.FORMAT": "RGB"}
    assert student.opts == {"INPUT.FORMAT": "RGB", "MODEL.META_ARCHITECTURE": "RetinaNet"}
    weights = {"MODEL.DISTILLER.TEACHER.WEIGHTS": str(tmp_path / "teacher" / "model_final.pth")}
    assert distil.opts == {"INPUT.FORMAT": "RGB", "MODEL.DISTILLER.INHERIT": "False", **weights}
    assert by_name["inherit+distil, seed 0"].opts["MODEL.DISTILLER.INHERIT"] == "True"
    assert by_name["inherit, seed 0"].opts["MODEL.DISTILLER.METHOD"] == ""
    assert student.needs == () and distil.needs == ("teacher",)
    assert distil.folder == tmp_path / "distil_1"


def test_ablations_switch_single_terms():
    runs = plan(CONFIG, "", ["no-attention", "only-attention"], [0], Path("out"), TEACHER)
    teacher, without, alone = (
        {k: v for k, v in run.opts.items() if k.endswith("_WEIGHT")} for run in runs
    )
    fgd = "MODEL.DISTILLER.FGD."
    assert without == {f"{fgd}ATTENTION_WEIGHT": "0.0"}
    rest = ("FOREGROUND", "BACKGROUND", "RELATION")
    assert alone == {f"{fgd}{term}_WEIGHT": "0.0" for term in rest}
    for run in runs[1:]:
        cfg = study_config(CONFIG, run.opts)  # the options are valid
        assert cfg.MODEL.DISTILLER.INHERIT  # the config's own choice


def test_a_method_is_an_arm_with_and_without_inheriting():
    arms = ["FGD", "inherit+FGD"]
    runs = plan(CONFIG, "t.yaml", [*arms, "distil"], [0], Path("out"), {}, {"FGD": 0.5})
    assert [run.arm for run in runs] == ["teacher", *arms, "distil"]
    weights = {"MODEL.DISTILLER.TEACHER.WEIGHTS": "out/teacher/model_final.pth"}
    keys = {"MODEL.DISTILLER.METHOD": "FGD", "MODEL.DISTILLER.INHERIT": "False", **weights}
    assert runs[1].opts == {**keys, "MODEL.DISTILLER.FACTOR": "0.5"}
    assert runs[2].opts == {**keys, "MODEL.DISTILLER.INHERIT": "True"}
    assert [run.balance for run in runs] == [False, False, True, False]
    assert runs[2].needs == ("teacher",) and runs[2].folder == Path("out/inherit+FGD_0")
    assert study_config(CONFIG, runs[1].opts).MODEL.DISTILLER.FACTOR == 0.5
    given = {**TEACHER, "MODEL.DISTILLER.FACTOR": "2.0"}
    run = plan(CONFIG, "", ["FGD"], [0], Path("out"), given)[1]
    assert run.opts["MODEL.DISTILLER.FACTOR"] == "2.0" and not run.balance


def test_a_sum_of_methods_is_one_arm():
    with method("Toy"):
        runs = plan(CONFIG, "t.yaml", ["FGD+Toy", "inherit+FGD+Toy"], [0], Path("out"), {})
        assert [x.opts["MODEL.DISTILLER.METHOD"] for x in runs[1:]] == ["FGD+Toy"] * 2
        assert [x.opts["MODEL.DISTILLER.INHERIT"] for x in runs[1:]] == ["False", "True"]


def test_a_method_without_teacher_needs_none_and_inherits_from_none():
    with method("Alone", needs=["maps"]):
        (run,) = plan(CONFIG, "", ["Alone"], [0], Path("out"), {})
        assert run.needs == () and "MODEL.DISTILLER.TEACHER.WEIGHTS" not in run.opts
        with pytest.raises(UserError, match="inherit.Alone: Alone has no teacher to inherit from"):
            plan(CONFIG, "t.yaml", ["inherit+Alone"], [0], Path("out"), {})
        assert len(plan(CONFIG, "t.yaml", ["inherit+FGD+Alone"], [0], Path("out"), {})) == 2


def test_a_method_that_the_config_refuses_is_named_before_anything_is_trained():
    opts = {**TEACHER, "MODEL.DISTILLER.FGD.TEMPERATURE": "0.0"}
    with pytest.raises(UserError, match="^FGD: MODEL.DISTILLER.FGD.TEMPERATURE"):
        plan(CONFIG, "", ["FGD"], [0], Path("out"), opts)


def test_a_teacher_that_is_there_is_evaluated_and_nobody_waits_for_it():
    teacher, distil = plan(CONFIG, "", ["distil"], [0], Path("out"), TEACHER)
    assert teacher.eval_only and teacher.opts == {"MODEL.WEIGHTS": "t.pth"}
    assert distil.needs == () and distil.opts["MODEL.DISTILLER.TEACHER.WEIGHTS"] == "t.pth"


def test_arms_of_equal_time_start_last_and_need_the_teacher_to_be_timed():
    arms = ["student-long", "student", "inherit+distil"]
    runs = plan(CONFIG, "t.yaml", arms, [0, 1], Path("out"), {})
    assert [r.arm for r in runs][-2:] == ["student-long"] * 2  # they start last
    assert runs[-1].needs == ("teacher",)
    assert runs[-1].opts == {"MODEL.META_ARCHITECTURE": "RetinaNet"}
    assert plan(CONFIG, "", arms, [0], Path("out"), TEACHER)[-1].needs == ()


@pytest.mark.parametrize(
    ("arms", "opts", "message"),
    [
        (["magic"], TEACHER, "magic unknown; there are student, inherit"),
        (["FGD+magic"], TEACHER, "FGD.magic unknown; there are .*inherit.METHOD for each of .*FGD"),
        (["inherit+magic"], TEACHER, "inherit.magic unknown"),
        (["inherit+"], TEACHER, "inherit. unknown"),
        (["FGD+FGD"], TEACHER, "'FGD.FGD' names a method twice"),
        (["FGD"], {}, "no teacher"),
        (["student-long", "FGD"], TEACHER, "takes, so add student"),
        (["student"], {"MODEL.META_ARCHITECTURE": "RetinaNet"}, "RetinaNet, but a study needs"),
        (["distil"], {}, "no teacher"),
        (["student", "student"], {}, "names an arm twice"),
        (["student-long"], {}, "so add student and inherit.distil"),
        (["pseudo-timed", "student", "FGD"], TEACHER, "time that FGD takes, so add pseudo"),
        (["no-magic"], TEACHER, "no-magic unknown; there are .*, only-relation"),
        (["student"], {"DATASETS.TEST": "('a', 'b')"}, "one test set, found"),
        (["student"], {"MODEL.NOTHING": "1"}, "MODEL.NOTHING"),
    ],
)
def test_refuses_what_cannot_be_run(arms, opts, message):
    with pytest.raises(UserError, match=message):
        plan(CONFIG, "", arms, [0], Path("out"), opts)


def test_a_student_alone_needs_no_teacher():
    assert len(plan(CONFIG, "", ["student"], [0], Path("out"), {})) == 1


def test_the_main_arm_is_the_config_as_it_stands():
    assert main_arm(study_config(CONFIG, {})) == "inherit+distil"
    assert main_arm(study_config(CONFIG, {"MODEL.DISTILLER.INHERIT": "False"})) == "distil"


def test_terms_that_are_off_have_no_arms():
    off = {"MODEL.DISTILLER.FGD.RELATION_WEIGHT": "0.0"}
    assert list(ablations(study_config(CONFIG, off)))[-1] == "only-attention"
    others = ("FOREGROUND", "BACKGROUND", "ATTENTION")
    off |= {f"MODEL.DISTILLER.FGD.{term}_WEIGHT": "0.0" for term in others[1:]}
    assert ablations(study_config(CONFIG, off)) == {}  # one term is left


def test_terms_of_one_name_in_a_sum_are_told_apart():
    words = {"MODEL.DISTILLER.METHOD": "DeFeat+FGD", "MODEL.DISTILLER.DEFEAT.OBJECT_WEIGHT": "1.0"}
    arms = ablations(study_config(CONFIG, words))
    assert "no-background" not in arms and {"no-object", "no-relation"} < arms.keys()
    assert arms["no-DeFeat.background"] == {"MODEL.DISTILLER.DEFEAT.BACKGROUND_WEIGHT": "0.0"}
    assert arms["no-FGD.background"] == {"MODEL.DISTILLER.FGD.BACKGROUND_WEIGHT": "0.0"}
