"""Teachers by name out of the table, and by code that the command line trusts."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import modeling
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgd.config import check_config, load_config
from fgd.distillation.config import teacher_name
from fgd.distillation.inherit import neck_and_head
from fgd.distillation.lazy_teacher import build_lazy_teacher, check_lazy_teacher, trust
from fgd.distillation.lazy_zoo import TEACHERS
from fgd.distillation.teacher import build_teacher, config_text, describe_teacher, teacher_config
from fgd.engine.same_start import describe_start
from fgd.errors import UserError
from fgd.study.plan import plan
from fgd.weights import weights_sha256
from tests.conftest import make_tiny_cfg

from .lazy_teachers import KEY, SQUARE, TINY, taught

# Parameters in thousands, of the whole and of the backbone; the square that it pads to.
SIZES = {
    "mask_rcnn_vitdet_b": (110896, 91449, 1024),
    "mask_rcnn_vitdet_l": (330685, 311238, 1024),
    "cascade_mask_rcnn_vitdet_b": (141161, 91449, 1024),
    "cascade_mask_rcnn_vitdet_l": (360950, 311238, 1024),
    "cascade_mask_rcnn_swin_b_in21k": (139312, 89600, 1024),
    "cascade_mask_rcnn_mvitv2_b_in21k": (103149, 53437, 1024),
    "mask_rcnn_R_50_FPN_100ep_LSJ": (46301, 26854, 0),
    "mask_rcnn_R_101_FPN_400ep_LSJ": (65293, 45847, 0),
    "mask_rcnn_regnetx_4gf_dds_FPN_200ep_LSJ": (43141, 23694, 0),
    "mask_rcnn_regnety_4gf_dds_FPN_400ep_LSJ": (41859, 22413, 0),
}


def student(**distiller):
    cfg = make_tiny_cfg("GeneralizedRCNN")
    cfg.INPUT.MAX_SIZE_TRAIN = SQUARE
    cfg.MODEL.DISTILLER.update(distiller)
    return cfg


def thousands(module):
    return round(sum(p.numel() for p in module.parameters()) / 1000)


@pytest.mark.parametrize("name", SIZES)
def test_a_name_builds_the_published_network_or_says_which_detectron2_has_it(name, monkeypatch):
    missing = [x for x in TEACHERS[name].needs if not hasattr(modeling, x)]
    if missing:
        with pytest.raises(UserError) as error:
            check_config(taught(student(), name))
        assert str(error.value) == (
            f"{KEY} lazy:{name}: this Detectron2 has no detectron2.modeling.{missing[0]}; v0.6 "
            "lacks it, Detectron2's main branch has it (docs/install.md says how to install that)"
        )
        return
    # Drop path reads its rates from a tensor.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        model = instantiate(TEACHERS[name].describe())
    whole, backbone, square = SIZES[name]
    assert (thousands(model), thousands(model.backbone)) == (whole, backbone)
    shapes = model.backbone.output_shape()
    assert {k: (x.stride, x.channels) for k, x in shapes.items()} == {
        f"p{k}": (2**k, 256) for k in range(2, 7)
    }
    assert getattr(model.backbone, "padding_constraints", {}).get("square_size", 0) == square
    assert type(model.roi_heads).__name__.startswith("Cascade") == name.startswith("cascade")
    assert (model.roi_heads.num_classes, model.roi_heads.mask_on) == (80, True)
    assert model.input_format == ("RGB" if square else "BGR")


def test_main_has_them_all():
    """So that no test of them is left out unnoticed where they are."""
    new = hasattr(modeling, "ViT")
    assert len(TINY) == (5 if new else 1) and hasattr(modeling, "MViT") == new


def test_the_table_has_addresses_of_detectron2_alone():
    assert len(TEACHERS) == 18
    for name, entry in TEACHERS.items():
        assert entry.weights.startswith("detectron2://") and entry.weights.endswith(".pkl")
        assert name.split("_100ep")[0] in entry.weights


def test_weights_need_not_be_named():
    cfg = taught(student(), "mask_rcnn_R_50_FPN_400ep_LSJ")
    check_config(cfg)
    address = "new_baselines/mask_rcnn_R_50_FPN_400ep_LSJ/42019571/model_final_14d201.pkl"
    assert teacher_name(cfg) == f"detectron2://{address}"
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "mine.pth"
    assert teacher_name(cfg) == "mine.pth"
    cfg.merge_from_list([KEY, "COCO-Detection/retinanet_R_50_FPN_1x.yaml"])
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = ""
    with pytest.raises(UserError, match="TEACHER.WEIGHTS is empty"):
        check_config(cfg)


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(
        UserError, match="lazy:vitdet: there is no such teacher; there are mask_rcnn_v"
    ):
        check_config(taught(student(), "vitdet"))
    with pytest.raises(UserError, match="config 'lazy:mask_rcnn_vitdet_b': no such file"):
        load_config("lazy:mask_rcnn_vitdet_b")


@pytest.mark.parametrize("kind", TINY)
def test_it_teaches_and_its_config_says_what_it_is(kind, distilled_by, make_batch):
    cfg = distilled_by(kind, student())
    path = cfg.MODEL.DISTILLER.TEACHER.WEIGHTS
    model, config = build_teacher(cfg)
    assert config.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    assert (config.MODEL.ROI_HEADS.NUM_CLASSES, config.INPUT.FORMAT) == (3, "RGB")
    mean = [120, 110, 100] if kind == "square" else [123.675, 116.28, 103.53]
    assert config.MODEL.PIXEL_MEAN == mean
    state = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert describe_teacher(cfg) == {"weights": path, "sha256": weights_sha256(path)}
    for method in ("FGD", "PKD", "NKD"):
        cfg.MODEL.DISTILLER.METHOD = method
        distiller = build_model(cfg).train()
        with EventStorage():
            losses = distiller(make_batch())
        assert all(value.isfinite() for value in losses.values())
        assert sum(losses[name] for name in distiller.distillation.loss_names) > 0
    assert f"teacher GeneralizedRCNN from {path} in float32" in distiller.describe()
    with pytest.raises(UserError, match=f"CONFIG_FILE lazy:{kind}: this command needs a yaml"):
        teacher_config(cfg)


@pytest.mark.parametrize("kind", TINY)
def test_weights_are_read_as_safely_as_others(kind, distilled_by, tmp_path):
    cfg = distilled_by(kind, student())
    node = cfg.MODEL.DISTILLER.TEACHER
    state = torch.load(node.WEIGHTS, weights_only=True)["model"]
    arrays = {name: np.asarray(value) for name, value in state.items()}
    node.WEIGHTS = str(tmp_path / "model_final.pkl")  # as the published ones
    Path(node.WEIGHTS).write_bytes(pickle.dumps({"model": arrays, "__author__": "third_party"}))
    model, _ = build_teacher(cfg)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    name = next(x for x in arrays if "norm" in x or "patch" in x)
    for fault, message in (
        (arrays[name][:0], name),
        (None, "not in the file"),
        (Path(), "code or"),
    ):
        broken = {**arrays, name: fault}
        if fault is None:
            del broken[name]
        Path(node.WEIGHTS).write_bytes(pickle.dumps({"model": broken, "__author__": "x"}))
        with pytest.raises(UserError, match=message):
            build_teacher(cfg)


def test_what_must_be_alike_on_all_machines(distilled_by, tmp_path):
    cfg = distilled_by("square", student())
    header = {"classes": ["a"], "teacher": describe_teacher(cfg)}
    assert config_text(cfg) == "lazy:square"
    facts = describe_start(cfg, header)
    assert facts["the teacher's config"] == "48456876"  # SHA-256 of the name
    cfg.merge_from_list([KEY, ""])
    assert "the teacher's config" not in describe_start(cfg, header) and config_text(cfg) == ""


def test_a_study_does_not_evaluate_it(distilled_by, tmp_path):
    cfg = distilled_by("square", student())
    (tmp_path / "student.yaml").write_text(cfg.dump())
    runs = plan(str(tmp_path / "student.yaml"), "", ["student", "distil"], [0], tmp_path, {})
    assert [x.arm for x in runs] == ["student", "distil"] and not runs[1].needs


@pytest.mark.parametrize("kind", TINY)
def test_what_is_inherited_is_neck_and_head_alone(kind):
    model = instantiate(TINY[kind].describe())
    names = neck_and_head(model)
    body = {"square": "patch"}.get(kind, "net" if "vitdet" in kind else "bottom_up")
    left = {name for name in model.state_dict() if name.startswith(f"backbone.{body}.")}
    assert left and (kind == "square" or names.keys() == model.state_dict().keys() - left)


CODE = """
from pathlib import Path
from detectron2.config import LazyCall
from tests.fgd.distillation.lazy_teachers import square_teacher
Path({marker!r}).touch()
model = square_teacher()
"""


@pytest.fixture
def code(tmp_path, table):
    """A user's LazyConfig file, which leaves a mark where it is executed."""
    path = tmp_path / "mine.py"
    path.write_text(CODE.format(marker=str(tmp_path / "executed")))
    return path


def test_code_is_executed_only_if_the_command_line_says_so(code, tmp_path):
    cfg = student()
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "mine.pth"
    cfg = taught(cfg, "x", "mine.pth")
    cfg.merge_from_list([KEY, str(code)])
    refusal = (
        f"{KEY} {code}: Python code, which is executed only by train_net.py and if its command "
        f"line says --trust-config {code} as well"
    )
    for use in (check_config, build_teacher, config_text):
        with pytest.raises(UserError) as error:
            use(cfg)
        assert str(error.value) == refusal
    trust("", str(code))  # the option was not given
    with pytest.raises(UserError, match="Python code"):
        check_config(cfg)
    assert not (tmp_path / "executed").exists()
    trust(str(code), str(code))
    check_config(cfg)
    assert not (tmp_path / "executed").exists()
    model, config = build_lazy_teacher(str(code), "cpu")
    assert (tmp_path / "executed").exists() and config.MODEL.PIXEL_STD == [60, 50, 40]
    assert config_text(cfg) == code.read_text()


def test_trust_is_in_one_file(code, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("model = 1")
    for option, file, message in (
        (str(tmp_path / "none.py"), str(code), "none.py: there is no such file of Python code"),
        (str(tmp_path), str(code), "there is no such file of Python code"),
        (str(code), str(other), f"{KEY} is '{other}'; name the same file there"),
        (str(code), "", f"{KEY} is ''; name the same file there"),
        (str(code), "lazy:mask_rcnn_vitdet_b", "'lazy:mask_rcnn_vitdet_b'; name the same"),
    ):
        with pytest.raises(UserError, match="^--trust-config .*") as error:
            trust(option, file)
        assert message in str(error.value)
    trust(str(code), str(code))
    with pytest.raises(UserError, match="Python code"):
        check_lazy_teacher(str(other))


@pytest.mark.parametrize(
    "text, message",
    {
        "model = {": "mine.py: SyntaxError: Config file",
        "1 / 0": "mine.py: ZeroDivisionError: division by zero",
        "dataloader = {}": "its 'model' builds no detector of Detectron2's kind (no backbone)",
        "from torch import nn\nfrom detectron2.config import LazyCall\n"
        "model = LazyCall(nn.Linear)(in_features=1)": "TypeError",
        "from tests.fgd.distillation.lazy_teachers import square_teacher\n"
        "model = square_teacher()\nmodel.input_format = None": "set model.input_format, the order",
    }.items(),
)
def test_faults_of_trusted_code_are_one_line(code, text, message):
    code.write_text(text)
    trust(str(code), str(code))
    with pytest.raises(UserError) as error:
        build_lazy_teacher(str(code), "cpu")
    assert message in str(error.value) and "\n" not in str(error.value)
