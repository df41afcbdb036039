"""The client gives what the runtime gives, and one line when the server does not."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from deploy import predict
from deploy.checks.verify_images import draw_scene
from deploy.client import TritonDetector, decode_response, encode_request
from deploy.errors import UserError
from deploy.runtime import OrtDetector
from deploy.triton_repository import main as write_repository

from .fake_graph import fake_spec, write_fake_graph
from .triton_server import LENGTH, TritonStandIn, answering, serve

URL = "http://server:8000/v2/models/toy"
ANY_SIZE = {"dynamic": "image", "height": None, "width": None}


def local(server, url="http://server:8000"):
    """A transport that asks `server` directly."""

    def transport(address, body, headers):
        status, content, headers = server.answer(address.removeprefix(url), body, headers)
        if status != 200:
            raise UserError(json.loads(content)["error"])
        return content, headers

    return transport


def write_models(folder, *options, **changes):
    """A fake graph and the repository made of it."""
    write_fake_graph(folder / "m.onnx", fake_spec(**changes))
    command = [folder / "m.onnx", folder / "repo", "--name", "toy", *options]
    assert write_repository([str(word) for word in command]) == 0
    return TritonStandIn(folder / "repo")


def assert_equal(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.size, one.input_size) == (other.size, other.input_size)


@pytest.mark.parametrize(
    "changes", [{}, {"input_dtype": "uint8"}, ANY_SIZE, {"dynamic": "none"}], ids=str
)
def test_the_client_gives_what_the_runtime_gives(tmp_path, changes):
    server = write_models(tmp_path, **changes)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in [(48, 99), (90, 31), (64, 64)]]
    client = TritonDetector(URL, min_score=0.2, transport=local(server))
    runtime = OrtDetector(tmp_path / "m.onnx", min_score=0.2)
    assert_equal(client.detect(images, 2), runtime.detect(images, 2))


def test_no_run_exceeds_the_servers_batch_size(tmp_path):
    """The stand-in refuses a larger one, as Triton does."""
    server = write_models(tmp_path, "--max-batch-size", 2)
    images = [np.full((64, 96, 3), i, np.uint8) for i in range(5)]
    client = TritonDetector(URL, transport=local(server))
    assert_equal(client.detect(images, 5), OrtDetector(tmp_path / "m.onnx").detect(images))
    client.max_batch = 5
    with pytest.raises(UserError, match="refused: batch"):
        client.detect(images, 5)


def test_golden_image_by_every_path(exported, tmp_path):
    """One picture through the class, the command, HTTP, and the command over HTTP."""
    student, photo = exported("RetinaNet"), tmp_path / "photo.png"
    scene = draw_scene(np.random.default_rng(7), (240, 320)).astype(np.uint8)
    Image.fromarray(scene[:, :, ::-1]).save(photo)
    runtime = OrtDetector(student.path)
    (expected,) = runtime.detect([photo])
    assert len(expected.scores) >= 5
    repository = tmp_path / "repo"
    assert write_repository([str(student.path), str(repository), "--name", "toy"]) == 0
    with serve(TritonStandIn(repository).answer) as address:
        url = f"{address}/v2/models/toy"
        assert_equal(TritonDetector(url).detect([photo, photo], 2), [expected] * 2)
        for model, out in ((student.path, "a"), (url, "b")):
            words = [model, photo, "--output", tmp_path / out, "--score", 0, "--no-images"]
            assert predict.main([str(word) for word in words]) == 0
    one, other = (json.loads((tmp_path / o / "detections.json").read_text()) for o in "ab")
    assert one["images"] == other["images"]
    (entry,) = one["images"]
    np.testing.assert_allclose(entry["boxes"], expected.boxes, atol=6e-4)
    assert entry["labels"] == expected.labels.tolist()
    assert other["model"] == url and other["graph_sha256"] is None


def test_request_bytes_follow_the_protocol():
    pixels = np.arange(6, dtype=np.uint8).reshape(1, 6)
    sizes = np.array([[1, 258]], np.int32)
    body, headers = encode_request({"images": pixels, "image_sizes": sizes}, ["boxes"])
    length = int(headers[LENGTH])
    assert json.loads(body[:length]) == {
        "inputs": [
            {
                "name": "images",
                "shape": [1, 6],
                "datatype": "UINT8",
                "parameters": {"binary_data_size": 6},
            },
            {
                "name": "image_sizes",
                "shape": [1, 2],
                "datatype": "INT32",
                "parameters": {"binary_data_size": 8},
            },
        ],
        "outputs": [{"name": "boxes", "parameters": {"binary_data": True}}],
    }
    assert body[length:] == bytes([0, 1, 2, 3, 4, 5]) + bytes([1, 0, 0, 0, 2, 1, 0, 0])


def test_identity_changes_with_the_version_and_the_interface(tmp_path):
    first = TritonDetector(URL, transport=local(write_models(tmp_path))).identity
    assert TritonDetector(URL, transport=local(TritonStandIn(tmp_path / "repo"))).identity == first
    second = write_models(tmp_path, "--version", 2)
    assert TritonDetector(URL, transport=local(second)).identity != first


@pytest.mark.parametrize(
    "url", ["ftp://host/v2/models/a", "http://host:8000", "http://host/v2/models/", "host/a"]
)
def test_urls_of_another_form_are_refused(url):
    with pytest.raises(UserError, match="not of the form"):
        TritonDetector(url)


@pytest.mark.parametrize(
    "answer, message",
    [
        (answering(b'{"error": "unknown model toy"}', 404), "404 unknown model toy"),
        (answering(b"<html>proxy</html>", 502), "502 Bad Gateway"),
        (answering(b"<html>"), "does not answer in JSON"),
        (answering(b"[1]"), "answers list"),
        (answering(b"{}"), "not written by deploy/triton_repository.py"),
        (answering(b'{"parameters": {"spec": {"string_value": "{}"}}}'), "not written by"),
        (answering(b'{"parameters": 3, "max_batch_size": "x"}'), "not written by"),
        (answering(b"{}", headers={"Content-Length": "99"}), "no answer from"),
    ],
)
def test_servers_without_such_a_model_are_one_line(answer, message):
    with serve(answer) as address, pytest.raises(UserError, match=message):
        TritonDetector(f"{address}/v2/models/toy")


@pytest.mark.parametrize("size", ["-1", "x", "1e9", "9" * 5000, "99999999", "\u0664", "1.0"])
def test_the_size_of_the_json_is_a_size(size):
    with pytest.raises(UserError, match=r"answers 2 bytes, '.* of them JSON"):
        decode_response(b"{}", {LENGTH: size}, URL)


@pytest.mark.parametrize(
    "batch", ['"8"', "-1", "1e400", "true", "[1]", "0.5", "1" + "0" * 400, "null"]
)
def test_a_batch_size_that_is_none_is_one_line(tmp_path, batch):
    real = local(write_models(tmp_path))

    def transport(address, body, headers):
        content, headers = real(address, body, headers)
        wrong = b'"max_batch_size": ' + batch.encode()
        return content.replace(b'"max_batch_size": 8', wrong), headers

    with pytest.raises(UserError, match=f"{URL} answers .* for max_batch_size"):
        TritonDetector(URL, transport=transport)


ODD = (b"[" * 200_000, b'{"a":' * 10**5, b"{", b'{"a": ' + b"1" * 5000 + b"}", b"\xff")


@pytest.mark.parametrize("body", ODD, ids=len)
@pytest.mark.parametrize("status", [200, 500])
def test_deep_and_odd_json_is_one_line(body, status):
    with serve(answering(body, status)) as address, pytest.raises(UserError) as error:
        TritonDetector(f"{address}/v2/models/toy")
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("depth", range(200, 1200, 50))
def test_any_depth_is_read_or_refused(tmp_path, depth):
    real = local(write_models(tmp_path))

    def transport(address, body, headers):
        content, headers = real(address, body, headers)
        return content[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}", headers

    try:
        found = TritonDetector(URL, transport=transport)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert found.spec.classes == TritonDetector(URL, transport=real).spec.classes


@pytest.mark.parametrize("url", ["http://[::1/v2/models/a", "http://h:x/v2/models/a"])
def test_addresses_that_are_none_are_one_line(url):
    with pytest.raises(UserError, match="no answer from .*models/a"):
        TritonDetector(url)


def output(name="boxes", shape=(1, 1), size=4, datatype="FP32"):
    return {
        "name": name,
        "shape": list(shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": size},
    }


@pytest.mark.parametrize(
    "outputs, blob, message",
    [
        ([output()], b"123", "3 bytes are left, 4 were announced"),
        ([output(size=10**400)], b"1234", "were announced"),
        ([output(size=math.inf)], b"1234", "inf were announced"),
        ([output(size=-4)], b"1234", "-4 were announced"),
        ([output(size="4")], b"1234", "'4' were announced"),
        ([output(shape=[10**30])], b"1234", "no binary tensors: OverflowError|ValueError"),
        ([output(shape=["1"])], b"1234", "no binary tensors: TypeError"),
        ([output(shape=[1] * 10_000)], b"1234", "no binary tensors: ValueError"),
        ([output(name=["boxes"])], b"1234", "no binary tensors: TypeError"),
        (5, b"", "no binary tensors: TypeError"),
        ([[]], b"", "no binary tensors: TypeError"),
        ([output(shape=(2, 1))], b"1234", "reshape"),
        ([output(size=3)], b"123", "multiple"),
        ([output(datatype="BYTES")], b"1234", "BYTES"),
        ([{"name": "boxes", "shape": [1], "datatype": "FP32", "data": [1]}], b"", "parameters"),
    ],
)
def test_damaged_answers_are_refused(outputs, blob, message):
    header = json.dumps({"outputs": outputs}).encode()
    with pytest.raises(UserError, match=message):
        decode_response(header + blob, {LENGTH: str(len(header))}, URL)


@pytest.mark.parametrize("damage", ["lacks boxes", "fewer rows", "other type"])
def test_answers_of_another_shape_are_refused(tmp_path, damage):
    server = write_models(tmp_path)
    real = local(server)

    def transport(address, body, headers):
        content, headers = real(address, body, headers)
        if address.endswith("/infer"):
            length = int(headers[LENGTH])
            answer = json.loads(content[:length])
            boxes = next(entry for entry in answer["outputs"] if entry["name"] == "boxes")
            if damage == "lacks boxes":
                boxes["name"] = "bboxes"
            elif damage == "fewer rows":
                boxes["shape"] = [1, 2, 6]
            else:
                boxes["datatype"] = "INT32"
            header = json.dumps(answer).encode()
            content, headers = header + content[length:], {LENGTH: str(len(header))}
        return content, headers

    client = TritonDetector(URL, transport=transport)
    with pytest.raises(UserError, match=r"for boxes, expected float32 \[1, 3, 4\]"):
        client.detect([np.zeros((64, 96, 3), np.uint8)])
