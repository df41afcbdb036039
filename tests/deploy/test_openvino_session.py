"""OpenVINO beside ONNX Runtime: the same detections, the same refusals, and nothing else done."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from deploy import evaluate, predict, verify
from deploy.checks.matching import Found, match_detections
from deploy.checks.verify_images import draw_scene
from deploy.errors import UserError
from deploy.runtime import GraphDetector, load
from deploy.serving import time_limit
from deploy.serving.engine import ENGINES, installed
from deploy.serving.openvino_session import INPUTS

from .coco_files import write_dataset
from .conftest import ARCHITECTURES, CANVAS
from .fake_graph import fake_spec, write_fake_graph
from .test_bounded_run import IMAGE, endless  # noqa: F401  a fixture
from .test_runtime import assert_identical

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path):
    write_fake_graph(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_both_engines_are_here_to_be_tested():
    assert installed() == list(ENGINES) == ["onnxruntime", "openvino"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_detections_are_those_of_onnx_runtime_to_the_last_digits(exported, arch):
    """And do not depend on threads, within a run or of those that call."""
    rng, path = np.random.default_rng(5), exported(arch).path
    images = [draw_scene(rng, size).astype(np.uint8) for size in [(96, 128), (120, 80)] * 2]
    expected = load(path, threads=1).detect(images, 3)
    detector = load(path, engine="openvino", threads=1)
    assert isinstance(detector, GraphDetector) and detector.session.providers == ["CPU"]
    found = detector.detect(images, 3)
    for one, other in zip(expected, found, strict=True):
        assert len(one.scores) == len(other.scores) >= 5
        both = [Found(x.boxes, x.scores, x.labels) for x in (one, other)]
        pairs = match_detections(*both).pairs
        assert len(pairs) == len(one.scores)
        for i, j in pairs:
            np.testing.assert_allclose(other.boxes[j], one.boxes[i], atol=1e-3, rtol=0)
            np.testing.assert_allclose(other.scores[j], one.scores[i], atol=5e-5, rtol=0)
    assert_identical(load(path, engine="openvino", threads=2).detect(images, 3), found)
    alone = detector.detect(images)
    with ThreadPoolExecutor(4) as pool:
        assert_identical(list(pool.map(lambda x: detector.detect([x])[0], images * 3)), alone * 3)


def test_it_computes_in_float32_and_keeps_no_cache(model):
    compiled = load(model, engine="openvino", threads=1).session.compiled
    names = ("INFERENCE_PRECISION_HINT", "EXECUTION_MODE_HINT", "INFERENCE_NUM_THREADS")
    found = [str(compiled.get_property(name)) for name in names]
    assert found == ["<Type: 'float32'>", "ExecutionMode.ACCURACY", "1"]


def damage(path, how):
    content, graph = path.read_bytes(), onnx.load(path)
    if how == "missing":
        path.unlink()
    elif how in ("empty", "cut off", "html"):
        parts = {"empty": b"", "cut off": content[:-700], "html": b"<html>404</html>"}
        path.write_bytes(parts[how])
    elif how == "of somebody else":
        write_fake_graph(path, metadata=False)
    elif how == "edited spec":
        fake_spec(classes=["a", "b", "c"]).to_json(path.with_suffix(".json"))
    elif how == "weights elsewhere":
        tensor = graph.graph.initializer[0]
        tensor.external_data.add(key="location", value="model.data")
        tensor.data_location = TensorProto.EXTERNAL
        onnx.save(graph, path)
    else:
        graph.graph.output[0].name = graph.graph.node[11].output[0] = "count_out"
        onnx.save(graph, path)


@pytest.mark.parametrize(
    "how",
    "missing,empty,cut off,html,of somebody else,edited spec,weights elsewhere,renamed".split(","),
)
def test_what_is_refused_is_refused_in_the_same_words(model, how):
    damage(model, how)
    messages = []
    for engine in ENGINES:
        with pytest.raises(UserError) as error:
            load(model, engine=engine)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "model." in messages[0]


def test_its_own_refusals_are_one_line(model, tmp_path):
    with pytest.raises(UserError, match=r"^OpenVINO cannot run .*: .*precision: f64, since the mo"):
        load(model, engine="openvino").run(np.zeros((1, 3, 64, 96)), np.array([[64, 96]], np.int32))
    with pytest.raises(UserError, match="^OpenVINO runs on the CPU here, not on cuda; providers"):
        load(model, engine="openvino", providers=["cuda"])
    with pytest.raises(UserError, match="^engine 'abacus': there is onnxruntime, openvino$"):
        load(model, engine="abacus")
    graph = onnx.load(model)
    graph.graph.node[0].op_type, graph.graph.node[0].domain = "Abracadabra", "magic"
    graph.opset_import.add(domain="magic", version=1)
    onnx.save(graph, model)
    with pytest.raises(UserError, match=r"^OpenVINO cannot load .*model\.onnx: .*Abracadabra"):
        load(model, engine="openvino")


def test_without_openvino_the_extra_is_named(model, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "deploy.serving.openvino_session", raising=False)
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    predicting = [str(model), str(tmp_path), "--output", str(tmp_path / "out")]
    for command, arguments in ((predict, predicting), (verify, [str(model), "student.pth"])):
        assert command.main([*arguments, "--engine", "openvino"]) == 2
        assert capsys.readouterr().err == (
            "error: OpenVINO cannot be used: import of openvino halted; None in sys.modules. It "
            "comes with the extra openvino: pip install -e '.[openvino]'\n"
        )


def test_a_loop_is_refused(endless):  # noqa: F811
    """Inside of one nothing ends a run."""
    with pytest.raises(UserError, match=r"endless\.onnx has a Loop, inside of which OpenVINO cann"):
        load(endless, engine="openvino")


def test_a_node_without_its_inputs_is_refused(model, exported):
    """OpenVINO would end the process."""
    least = {schema.name: schema.min_input for schema in onnx.defs.get_all_schemas()}
    assert {name: least[name] for name in INPUTS} == INPUTS
    for arch in ARCHITECTURES:
        operators = {node.op_type for node in onnx.load(exported(arch).path).graph.node}
        assert {name for name in operators if least[name] > 1} <= INPUTS.keys()
    graph = onnx.load(model)
    (conv,) = [node for node in graph.graph.node if node.op_type == "Conv"]
    del conv.input[1]
    onnx.save(graph, model)
    with pytest.raises(UserError, match=r"is damaged: it has a Conv with 1 of at least 2 inputs"):
        load(model, engine="openvino")


def slow_graph(path, layers=40):
    """The known graph with many convolutions of a large map before its scores."""
    write_fake_graph(path)
    model = onnx.load(path)
    conv = next(node for node in model.graph.node if node.output[0] == "features")
    conv.output[0] = "small"
    rng = np.random.default_rng(0)
    first = rng.normal(0, 0.1, (16, 3, 1, 1)).astype(np.float32)
    again, last = (rng.normal(0, 0.08, (n, 16, 3, 3)).astype(np.float32) for n in (16, 3))
    tensors = {"times": np.array([1, 1, 3, 3], np.int64), "first_w": first}
    for name, value in {**tensors, "again_w": again, "last_w": last}.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    chain = [("Tile", ["small", "times"], {}), ("Conv", ["x0", "first_w"], {})]
    pads = {"pads": [1, 1, 1, 1]}
    chain += [("Conv", [f"x{i + 1}", "again_w"], pads) for i in range(layers)]
    chain.append(("Conv", [f"x{layers + 1}", "last_w"], pads))
    for i, (kind, inputs, attributes) in enumerate(chain):
        name = "features" if i == len(chain) - 1 else f"x{i}"
        model.graph.node.append(helper.make_node(kind, inputs, [name], **attributes))
    onnx.save(model, path)


def test_a_run_is_ended_at_the_time_limit(tmp_path, monkeypatch):
    path = tmp_path / "slow.onnx"
    slow_graph(path)
    detector = load(path, engine="openvino", threads=1)
    feed = np.zeros((1, 3, 64, 96), np.float32), np.array([[64, 96]], np.int32)
    detector.run(*feed)

    def cpu_time():
        start = time.process_time()
        detector.run(*feed)
        return time.process_time() - start

    whole = cpu_time()
    monkeypatch.setattr(time_limit, "_seconds", 0.002)
    start = time.process_time()
    with pytest.raises(UserError) as error:
        detector.run(*feed)
    assert str(error.value) == f"{path} ran for more than 0.002 s and was ended (--time-limit)"
    assert time.process_time() - start < 0.5 * whole
    monkeypatch.undo()
    assert detector.run(*feed)["scores"].shape == (1, 3)


def test_an_image_of_nan_is_refused(exported):
    """OpenVINO's ReLU makes 0 of NaN, so that something is found in it; its scores say no."""
    detector = load(exported("RetinaNet").path, engine="openvino", threads=1)
    found = detector.run(np.full((1, 3, *CANVAS), np.nan, np.float32), np.array([CANVAS], np.int32))
    assert np.isnan(found["scores"]).all()


def test_the_commands_take_it(model, tmp_path):
    data = write_dataset(tmp_path)
    images = sorted(str(path) for path in (tmp_path / "images").iterdir())
    reports = {}
    for engine in ENGINES:
        output = tmp_path / engine
        options = ["--no-images", "--score", "0", "--engine", engine, "--output", str(output)]
        assert predict.main([str(model), *images, *options]) == 0
        ap = ["--dataset", str(data), "--output", str(output / "ap.json"), "--engine", engine]
        assert evaluate.main([str(model), *ap]) == 0
        read = [json.loads((output / name).read_text()) for name in ("detections.json", "ap.json")]
        assert read[1].pop("engine").startswith(f"{ENGINES[engine]} ")
        assert read[1].pop("providers") and read[1].pop("onnx_seconds") >= 0
        reports[engine] = read
    assert reports["onnxruntime"] == reports["openvino"]
    assert reports["openvino"][1]["metrics"]["AP"]["onnx"] == pytest.approx(100)
    # a run that one engine began is not finished by the other
    again = ["--no-images", "--score", "0", "--resume", "--output", str(tmp_path / "openvino")]
    assert predict.main([str(model), *images, *again]) == 2
    assert predict.main([str(model), *images, *again, "--engine", "openvino"]) == 0


def test_nothing_is_sent_and_nothing_is_written(model, tmp_path):
    """`import openvino` tells its makers by the package openvino_telemetry, if that is there."""
    home, site = tmp_path / "home", tmp_path / "site"
    for folder in (home, site):
        folder.mkdir()
    (site / "openvino_telemetry.py").write_text("raise SystemExit('it is imported')")
    code = (
        "import importlib.util, numpy, sys; from deploy.runtime import load\n"
        f"found = load({str(model)!r}, engine='openvino').detect([numpy.zeros((9, 9, 3), 'u1')])\n"
        "assert len(found[0].scores) == 3 and 'openvino_telemetry' not in sys.modules\n"
        "assert importlib.util.find_spec('openvino_telemetry')\n"
    )
    path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "projects" / "FGD"), *sys.path])
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": path}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=home, env=env)
    assert list(home.iterdir()) == []
