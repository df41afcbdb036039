import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fgd.config import get_fgd_cfg
from fgd.data.checks import check_class_count, class_names
from fgd.errors import UserError

ARCHITECTURES = {
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
}


@pytest.fixture
def add_dataset():
    """Factory of registered datasets without files, taken back at the end."""
    added = []

    def add(name, classes, known_before_loading=True):
        def load():
            MetadataCatalog.get(name).thing_classes = list(classes)
            return []

        DatasetCatalog.register(name, load)
        added.append(name)
        if known_before_loading:
            load()
        return name

    yield add
    for name in added:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def cfg_for(architecture, count, train=(), test=()):
    cfg = get_fgd_cfg()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.merge_from_list([ARCHITECTURES.get(architecture, "VERSION"), count])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    return cfg


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_counts_give_the_names(add_dataset, architecture):
    name = add_dataset("checks_three", ["a", "b", "c"])
    assert check_class_count(cfg_for(architecture, 3, (name,), (name,))) == ["a", "b", "c"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("classes", [2, 4, 6], ids="dataset_has_{}".format)
def test_other_counts_show_both_the_names_and_the_key(add_dataset, architecture, classes):
    """One class more than outputs is the case that would train silently as background."""
    name = add_dataset("checks_other", list("abcdef")[:classes])
    with pytest.raises(UserError) as caught:
        check_class_count(cfg_for(architecture, 3, (name,)))
    names = ", ".join(list("abcdef")[:classes])
    key = ARCHITECTURES[architecture]
    assert str(caught.value) == (
        f"the dataset has {classes} classes ({names}) but {key} is 3: set {key} {classes}"
    )


def test_a_distilled_student_is_checked_by_its_own_architecture(add_dataset):
    name = add_dataset("checks_distilled", ["a", "b"])
    cfg = cfg_for("Distiller", 2, (name,))
    cfg.MODEL.DISTILLER.STUDENT = "GeneralizedRCNN"
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2, 3
    with pytest.raises(UserError, match="ROI_HEADS.NUM_CLASSES is 3"):
        check_class_count(cfg)
    cfg.MODEL.DISTILLER.STUDENT = "RetinaNet"
    assert check_class_count(cfg) == ["a", "b"]


def test_train_and_test_must_agree_in_names_and_order(add_dataset):
    train = add_dataset("checks_train", ["a", "b"])
    test = add_dataset("checks_test", ["b", "a"])
    with pytest.raises(UserError, match="'checks_train' and 'checks_test' differ.* a, b .* b, a"):
        check_class_count(cfg_for("RetinaNet", 2, (train,), (test,)))


def test_classes_that_are_known_only_after_loading(add_dataset):
    name = add_dataset("checks_lazy", ["a", "b"], known_before_loading=False)
    assert class_names(cfg_for("RetinaNet", 2, (), (name,))) == ["a", "b"]


def test_builtin_names_need_no_files():
    names = class_names(cfg_for("RetinaNet", 80, ("coco_2017_train",), ("coco_2017_val",)))
    assert len(names) == 80 and names[0] == "person"


def test_long_lists_are_cut():
    with pytest.raises(UserError, match=r"80 classes \(person, .*, \.\.\. 80 in all\)"):
        check_class_count(cfg_for("RetinaNet", 3, ("coco_2017_train",)))


def test_names_left_unregistered_are_passed_over_but_not_all(add_dataset):
    name = add_dataset("checks_eval", ["a", "b"])
    assert check_class_count(cfg_for("RetinaNet", 2, ("shapes_train",), (name,))) == ["a", "b"]
    with pytest.raises(UserError, match=r"no registered dataset .*\['shapes_train'\]"):
        class_names(cfg_for("RetinaNet", 2, ("shapes_train",)))


def test_no_classes_and_unknown_architectures_are_refused(add_dataset):
    with pytest.raises(UserError, match="'checks_empty' has no thing_classes"):
        class_names(cfg_for("RetinaNet", 2, (add_dataset("checks_empty", []),)))
    with pytest.raises(UserError, match="'PanopticFPN' is none of those known: RetinaNet, FCOS"):
        check_class_count(cfg_for("PanopticFPN", 2))


def test_line_breaks_in_names_do_not_break_the_message(add_dataset):
    name = add_dataset("checks_lines", ["a\n# b", "c\u2028d"])
    with pytest.raises(UserError, match=r"has 2 classes \(a # b, c d\) but"):
        check_class_count(cfg_for("RetinaNet", 3, (name,)))
