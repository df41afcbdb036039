"""A graph that never ends is ended, and the others that run beside it are not."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy import evaluate, predict
from deploy.errors import UserError
from deploy.runtime import OrtDetector
from deploy.serving import bounded_run, time_limit

from .coco_files import write_dataset
from .fake_graph import write_fake_graph

IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture
def endless(tmp_path):
    """The known graph with a Loop of 2^62 rounds before its scores."""
    path = tmp_path / "endless.onnx"
    write_fake_graph(path)
    model = onnx.load(path)
    scores = next(node for node in model.graph.node if node.output[0] == "scores")
    scores.output[0] = "before"
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Abs", ["kept"], ["again"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("kept", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("again", TensorProto.FLOAT, None),
        ],
    )
    model.graph.node.append(
        helper.make_node("Loop", ["rounds", "", "before"], ["scores"], body=body)
    )
    rounds = numpy_helper.from_array(np.array(2**62, np.int64), "rounds")
    model.graph.initializer.append(rounds)
    onnx.save(model, path)
    return path


@pytest.fixture
def short():
    time_limit.limit_time(0.2)
    yield


def test_an_endless_loop_is_one_line(endless, short):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        OrtDetector(endless, threads=1).detect([IMAGE])
    assert time.monotonic() - start < 5
    assert str(error.value) == (f"{endless} ran for more than 0.2 s and was ended (--time-limit)")
    assert not bounded_run._ends


def test_other_runs_go_on_beside_it(endless, tmp_path, short):
    write_fake_graph(tmp_path / "m.onnx")
    sound = OrtDetector(tmp_path / "m.onnx", threads=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(OrtDetector(endless, threads=1).detect, [IMAGE])
        while not waiting.done():
            assert len(sound.detect([IMAGE])[0].scores) == 3
    with pytest.raises(UserError, match="was ended"):
        waiting.result()


def test_the_commands_end_too(endless, tmp_path, capsys):
    data = write_dataset(tmp_path)
    limit = ["--time-limit", "0.1", "--threads", "1"]
    assert evaluate.main([str(endless), "--dataset", str(data), *limit]) == 2
    assert "ran for more than 0.1 s" in capsys.readouterr().err
    images = [str(path) for path in (tmp_path / "images").iterdir()]
    command = [str(endless), *images, "--output", str(tmp_path / "out"), *limit]
    assert predict.main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(images) and all("ran for more than 0.1 s" in line for line in lines)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_other_limits_are_usage_errors(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        predict.build_parser().parse_args(["m", "i", "--output", "o", f"--time-limit={text}"])
    assert "--time-limit" in capsys.readouterr().err
