"""tools/checkout.py: what `make test-main` installs where main's source cannot be had."""

import runpy
import sys

import pytest

from tests.test_third_party import load
from tools import checkout


@pytest.fixture
def package(tmp_path):
    """An installed ``detectron2`` with the model_zoo that third_party's patches leave."""
    zoo = tmp_path / "site-packages" / "detectron2" / "model_zoo"
    zoo.parent.mkdir(parents=True)
    (zoo.parent / "__init__.py").touch()
    (zoo / "configs" / "COCO-Detection").mkdir(parents=True)
    (zoo / "configs" / "COCO-Detection" / "x.yaml").write_text("X: 1\n")
    patches = load("patches").PATCHES
    texts = [mended for name, _, mended in patches if name == "model_zoo/model_zoo.py"]
    body = f"\n\ndef get_config_file(config_path):\n    return {texts[1]}\n"
    (zoo / "model_zoo.py").write_text(texts[0] + body)
    (zoo.parent / "__pycache__").mkdir()
    return zoo.parent


def test_it_has_the_layout_of_main(package, tmp_path, monkeypatch):
    made = tmp_path / "checkout"
    checkout.make_checkout(package, made)
    assert (made / "configs" / "COCO-Detection" / "x.yaml").is_file()
    assert not (made / "detectron2" / "model_zoo" / "configs").exists()
    assert not (made / "detectron2" / "__pycache__").exists()
    text = (made / "detectron2" / "model_zoo" / "model_zoo.py").read_text()
    assert text.startswith("import pkg_resources\n") and "importlib" not in text
    assert package.joinpath("model_zoo", "configs").is_dir()  # the installed one is as it was

    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **words: given.update(words))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(made)
    runpy.run_path(str(made / "setup.py"))
    assert given["name"] == "detectron2" and {"detectron2", "tools"} <= set(given["packages"])
    (source,) = given["ext_modules"][0].sources
    assert (made / source).is_file()
    linked = made / "detectron2" / "model_zoo" / "configs"
    assert linked.is_symlink() and (linked / "COCO-Detection" / "x.yaml").is_file()


def test_another_detectron2_is_refused(package, tmp_path):
    (package / "model_zoo" / "model_zoo.py").write_text("import pkg_resources\n")
    with pytest.raises(ValueError, match="is not third_party/detectron2's; model_zoo/model_zoo.py"):
        checkout.make_checkout(package, tmp_path / "checkout")
    assert not (tmp_path / "checkout").exists()


def test_nothing_is_overwritten(capsys, tmp_path):
    (tmp_path / "mine").write_text("kept")
    assert checkout.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}: is there already; remove it, or name another folder\n"
    )
    assert (tmp_path / "mine").read_text() == "kept"
