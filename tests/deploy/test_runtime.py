"""OrtDetector on graphs whose outputs are known exactly, and its refusals."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from PIL import Image

from deploy.checks.verify_images import draw_scene
from deploy.errors import UserError
from deploy.runtime import OrtDetector
from deploy.serving.detector import rescale
from deploy.serving.preprocess import make_batch, prepare
from fgd.config import load_config_text

from .conftest import ARCHITECTURES
from .fake_graph import FRACTIONS, fake_spec, write_fake_graph

NO_CANVAS = {"dynamic": "image", "height": None, "width": None}


@pytest.fixture
def model(tmp_path):
    write_fake_graph(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def plain(height, width, bgr=(255, 128, 26)):
    return np.full((height, width, 3), bgr, np.uint8)


def test_boxes_come_back_in_original_pixels(model):
    """480x640 is resized to 64x85: the fractions must hold on the original size again."""
    (found,) = OrtDetector(model).detect([plain(480, 640)])
    assert found.size == (480, 640) and found.input_size == (64, 85) and not found.shrunk
    expected = np.array(FRACTIONS) * [640, 480, 640, 480]
    np.testing.assert_allclose(found.boxes, expected, atol=1e-3)
    np.testing.assert_allclose(found.scores, np.array([255, 128, 26]) / 255, atol=1e-6)
    assert found.labels.tolist() == [0, 1, 2] and found.boxes.dtype == np.float32


@pytest.mark.parametrize("order, expected", [("BGR", [30, 20, 10]), ("RGB", [10, 20, 30])])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_channel_order_is_the_specs_for_every_kind_of_source(tmp_path, order, expected, dtype):
    write_fake_graph(tmp_path / "m.onnx", fake_spec(input_format=order, input_dtype=dtype))
    rgb = plain(64, 96, (10, 20, 30))
    Image.fromarray(rgb).save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(rgb), rgb[:, :, ::-1]]
    for found in OrtDetector(tmp_path / "m.onnx").detect(sources):
        np.testing.assert_allclose(found.scores * 255, expected, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, NO_CANVAS, {"dynamic": "none"}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_ragged_batches_equal_single_images(tmp_path, changes, batch_size):
    write_fake_graph(tmp_path / "m.onnx", fake_spec(**changes))
    sizes = [(48, 100), (200, 150), (64, 64), (90, 31), (480, 640)]
    images = [plain(h, w, (i * 40, i * 30, i * 20)) for i, (h, w) in enumerate(sizes)]
    detector = OrtDetector(tmp_path / "m.onnx")
    found = detector.detect(images, batch_size=batch_size)
    for detections, (h, w), i in zip(found, sizes, range(5), strict=True):
        assert detections.size == (h, w)
        np.testing.assert_allclose(detections.boxes, np.array(FRACTIONS) * [w, h, w, h], atol=1e-3)
        np.testing.assert_allclose(detections.scores * 255, [i * 40, i * 30, i * 20], atol=1e-4)


def test_portrait_on_a_landscape_canvas_is_shrunk_and_says_so(model):
    (found,) = OrtDetector(model).detect([plain(640, 480)])
    assert found.input_size == (64, 48) and found.shrunk
    expected = np.array(FRACTIONS) * [480, 640, 480, 640]
    np.testing.assert_allclose(found.boxes, expected, atol=1e-3)


def test_only_valid_rows_above_the_score_and_not_empty_are_returned(tmp_path):
    write_fake_graph(tmp_path / "two.onnx", count=2)
    assert len(OrtDetector(tmp_path / "two.onnx").detect([plain(64, 96)])[0].scores) == 2
    write_fake_graph(tmp_path / "none.onnx", count=0)
    (found,) = OrtDetector(tmp_path / "none.onnx").detect([plain(64, 96)])
    assert found.boxes.shape == (0, 4) and found.scores.shape == found.labels.shape == (0,)
    fractions = (FRACTIONS[0], (0.3, 0.2, 0.3, 0.9), (1.1, 0.0, 1.5, 1.0))  # flat, outside
    write_fake_graph(tmp_path / "empty.onnx", fractions=fractions)
    assert OrtDetector(tmp_path / "empty.onnx").detect([plain(9, 9)])[0].labels.tolist() == [0]
    detector = OrtDetector(tmp_path / "two.onnx", min_score=0.6)
    assert detector.detect([plain(64, 96)])[0].labels.tolist() == [0]


def test_no_images_and_no_batch(model):
    detector = OrtDetector(model)
    assert detector.detect([]) == []
    with pytest.raises(UserError, match="batch size is 0"):
        detector.detect([plain(4, 4)], batch_size=0)


def test_rescale_equals_detectron2s_postprocessing():
    generator = np.random.default_rng(0)
    boxes = generator.uniform(-30, 1400, (500, 4)).astype(np.float32)
    instances = Instances((800, 1067), pred_boxes=Boxes(torch.from_numpy(boxes.copy())))
    expected = detector_postprocess(instances, 375, 500).pred_boxes.tensor.numpy()
    actual = rescale(boxes, (800, 1067), (375, 500))
    actual = actual[(actual[:, 2:] > actual[:, :2]).all(axis=1)]
    assert 50 < len(actual) < 500
    np.testing.assert_array_equal(actual, expected)


def test_threads_sharing_a_session_agree_with_serial_calls(model):
    detector = OrtDetector(model, threads=1)
    images = [plain(50 + i, 90 - i, (i, 2 * i, 3 * i)) for i in range(40)]
    serial = [detector.detect([image])[0] for image in images]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda image: detector.detect([image])[0], images))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize("pixels", [0, 255], ids=["nan", "infinity"])
def test_non_finite_outputs_are_reported(tmp_path, pixels):
    write_fake_graph(tmp_path / "m.onnx", divisor=0.0)
    with pytest.raises(UserError, match=r"m\.onnx gives NaN or infinity"):
        OrtDetector(tmp_path / "m.onnx").detect([plain(8, 8, (pixels,) * 3)])


@pytest.mark.parametrize("fixture", ["dynamic_retinanet", "agnostic_rcnn"])
def test_a_network_that_fails_is_reported_not_taken_for_an_empty_image(request, fixture, tmp_path):
    """One weight of the last layer is NaN: every comparison with the threshold is false then."""
    student, path = request.getfixturevalue(fixture), tmp_path / "model.onnx"
    scene = draw_scene(np.random.default_rng(3), (96, 128)).astype(np.uint8)
    assert len(OrtDetector(student.path).detect([scene])[0].scores) > 0
    graph = onnx.load(student.path)
    ends = {"raw.logits.p3", "raw.class_logits"}
    (last,) = [node for node in graph.graph.node if ends & set(node.output)]
    (bias,) = [t for t in graph.graph.initializer if t.name == last.input[2]]
    values = np.full(tuple(bias.dims), np.nan, np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(graph, path)
    detector = OrtDetector(path)
    pixels, sizes = make_batch([prepare(scene, detector.spec)], detector.spec)
    assert detector.run(pixels, sizes)["num_dets"].tolist() == [[0]]
    with pytest.raises(UserError, match=r"model\.onnx gives NaN or infinity for an image of \(96"):
        detector.detect([scene])


def test_nan_in_one_image_of_a_batch_is_that_images(agnostic_rcnn):
    detector = OrtDetector(agnostic_rcnn.path)
    rng = np.random.default_rng(3)
    images = [draw_scene(rng, size).astype(np.uint8) for size in [(96, 128), (64, 128), (96, 64)]]
    pixels, sizes = make_batch(images, detector.spec)
    expected = detector.run(pixels, sizes)
    pixels[1, 2, 9, 9] = np.nan
    pixels[2, :, :, 64:] = np.nan  # beside the image, where anything may be
    found = detector.run(pixels, sizes)
    assert np.isnan(found["scores"]).all(axis=1).tolist() == [False, True, False]
    for name in expected:
        np.testing.assert_array_equal(found[name][[0, 2]], expected[name][[0, 2]])
    assert expected["num_dets"][[0, 2]].min() > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_thread_counts_do_not_change_a_bit(exported, arch):
    """1, 2, 4 and 8 threads within the graph, and as many calling one detector at once."""
    rng, path = np.random.default_rng(5), exported(arch).path
    images = [draw_scene(rng, size).astype(np.uint8) for size in [(96, 128), (120, 80)] * 4]
    expected = OrtDetector(path, threads=1).detect(images)
    assert sum(len(found.scores) for found in expected) >= 5
    for threads in (1, 2, 4, 8):
        detector = OrtDetector(path, threads=threads)
        assert_identical(detector.detect(images), expected)
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda image, d=detector: d.detect([image])[0], images))
        assert_identical(found, expected)


def assert_identical(found, expected):
    for one, other in zip(found, expected, strict=True):
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_more_labels_than_class_names_is_reported(tmp_path):
    write_fake_graph(tmp_path / "m.onnx", labels=(0, 1, 3))
    with pytest.raises(UserError, match=r"m\.onnx gives a class of 3, expected 0\.\.2"):
        OrtDetector(tmp_path / "m.onnx").detect([plain(8, 8)])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"count": -1000}, "gives -1000 detections, expected 0..3"),
        ({"count": 4}, "gives 4 detections, expected 0..3"),
        ({"divisor": 5.1}, "gives a score of 50, expected 0..1"),
        ({"divisor": -255.0}, "gives a score of -1, expected 0..1"),
        ({"divisor": 0.0}, "gives NaN or infinity for an image of (8, 8): its weights are"),
        ({"labels": (-1, 0, 0)}, "gives a class of -1, expected 0..2"),
        ({"fractions": ((np.nan, 0, 1, 1),) * 3}, "gives NaN or infinity for an image of (8, 8)"),
    ],
    ids=str,
)
def test_answers_that_no_detector_gives_are_one_line(tmp_path, changes, message):
    write_fake_graph(tmp_path / "m.onnx", **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        OrtDetector(tmp_path / "m.onnx").detect([plain(8, 8, (255, 128, 26))])


def test_huge_boxes_are_clipped_without_a_warning(tmp_path, recwarn):
    write_fake_graph(tmp_path / "m.onnx", fractions=((0, 0, 3e36, 3e36),) * 3)
    (found,) = OrtDetector(tmp_path / "m.onnx").detect([plain(640, 960)])
    assert found.boxes.tolist() == [[0, 0, 960, 640]] * 3 and not recwarn.list


def test_what_cannot_be_run_is_one_line(model):
    detector = OrtDetector(model)
    with pytest.raises(UserError, match=r"^ONNX Runtime cannot run .*model\.onnx: .*tensor"):
        detector.run(np.zeros((1, 3, 5, 5), np.float64), np.zeros((1, 2), np.int32))


def test_shapes_are_those_of_the_answer_not_of_the_declaration(model, monkeypatch):
    detector = OrtDetector(model)
    outputs = detector.run(np.zeros((1, 3, 64, 96), np.float32), np.array([[64, 96]], np.int32))
    monkeypatch.setattr(detector, "run", lambda *_: {**outputs, "labels": outputs["labels"][:, :2]})
    with pytest.raises(UserError, match=r"answers int32 \[1, 2\] for labels, expected int32"):
        detector.detect([plain(64, 96)])


@pytest.mark.parametrize("field, value", [("classes", ["a", "b", "c"]), ("min_size", 32)])
def test_an_edited_sidecar_is_refused(model, field, value):
    hashes = {"graph_sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    fake_spec(hashes=hashes, **{field: value}).to_json(model.with_suffix(".json"))
    with pytest.raises(UserError, match=rf"model\.json was edited: {field} is .*, as the graph"):
        OrtDetector(model)


def test_sidecar_must_belong_to_the_graph(model):
    spec = fake_spec(hashes={"graph_sha256": hashlib.sha256(model.read_bytes()).hexdigest()})
    spec.to_json(model.with_suffix(".json"))
    assert OrtDetector(model).sha256 == spec.hashes["graph_sha256"]
    graph = onnx.load(model)
    graph.graph.name = "changed"
    onnx.save(graph, model)
    with pytest.raises(UserError, match=r"model\.onnx is not the graph that .*model\.json"):
        OrtDetector(model)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "html", "folder"])
def test_damaged_files_are_refused_by_name(model, damage):
    content = model.read_bytes()
    model.unlink()
    if damage == "folder":
        model.mkdir()
    elif damage != "missing":
        parts = {"empty": b"", "truncated": content[:-700], "html": b"<html>404</html>"}
        model.write_bytes(parts[damage])
    with pytest.raises(UserError, match=r"model\.onnx"):
        OrtDetector(model)


def test_unknown_operators_are_refused_by_name(model):
    graph = onnx.load(model)
    graph.graph.node[0].op_type, graph.graph.node[0].domain = "Abracadabra", "magic"
    graph.opset_import.add(domain="magic", version=1)
    onnx.save(graph, model)
    with pytest.raises(UserError, match=r"cannot load .*model\.onnx.*Abracadabra"):
        OrtDetector(model)


def test_foreign_graphs_are_refused(tmp_path):
    write_fake_graph(tmp_path / "bare.onnx", metadata=False)
    with pytest.raises(UserError, match=r"bare\.onnx was not written by deploy/export"):
        OrtDetector(tmp_path / "bare.onnx")
    write_fake_graph(tmp_path / "renamed.onnx")
    graph = onnx.load(tmp_path / "renamed.onnx")
    graph.graph.output[0].name = graph.graph.node[11].output[0] = "count_out"
    onnx.save(graph, tmp_path / "renamed.onnx")
    with pytest.raises(UserError, match=r"outputs \['count_out'"):
        OrtDetector(tmp_path / "renamed.onnx")
    write_fake_graph(tmp_path / "typed.onnx")
    graph = onnx.load(tmp_path / "typed.onnx")
    onnx.helper.set_model_props(graph, fake_spec(input_dtype="uint8").to_metadata())
    onnx.save(graph, tmp_path / "typed.onnx")
    with pytest.raises(UserError, match="says uint8"):
        OrtDetector(tmp_path / "typed.onnx")


@pytest.mark.parametrize("provider", ["cuda", "CUDAExecutionProvider", "tensorrt", "abacus"])
def test_absent_providers_are_errors_not_cpu_runs(model, provider, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(UserError, match=r"(?i)provider|TensorRT|abacus"):
        OrtDetector(model, providers=[provider])


def test_used_provider_is_compared_with_the_wanted_one(model, monkeypatch):
    """A build that lists CUDA but falls back: what an onnxruntime-gpu does on a bare machine."""
    from deploy.serving import ort_session

    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    real = ort_session.ort.InferenceSession
    monkeypatch.setattr(ort_session.ort, "get_available_providers", lambda: listed)
    monkeypatch.setattr(
        ort_session.ort,
        "InferenceSession",
        lambda *args, providers, **kwargs: real(*args, providers=listed[1:], **kwargs),
    )
    with pytest.raises(UserError, match="asked for CUDA.*started CPU"):
        OrtDetector(model, providers=["cuda"])


def default_predictor(student):
    """Detectron2's own, from nothing but the checkpoint."""
    config = torch.load(student.checkpoint, weights_only=True)["config"]
    cfg = load_config_text(config, str(student.checkpoint))
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(student.checkpoint)
    return DefaultPredictor(cfg)


def assert_same_detections(found, instances):
    """Equal in number, class and place: 0.1 pixels, whatever the order of equal scores."""
    assert len(found.scores) == len(instances) >= 5, "vacuous: too few detections"
    boxes, labels = instances.pred_boxes.tensor.numpy(), instances.pred_classes.numpy()
    free = np.ones(len(boxes), bool)
    for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        distance = np.abs(boxes - box).max(axis=1) + 1e6 * (labels != label) + 1e6 * ~free
        nearest = distance.argmin()
        assert distance[nearest] < 0.1
        assert instances.scores[nearest] == pytest.approx(score, abs=1e-3)
        free[nearest] = False


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_image_files_give_what_default_predictor_gives(exported, tmp_path, arch, suffix):
    student, path = exported(arch), tmp_path / f"scene{suffix}"
    scene = draw_scene(np.random.default_rng(7), (240, 320))  # resized, it fills the canvas
    Image.fromarray(scene.astype(np.uint8)).save(path)
    expected = default_predictor(student)(read_image(str(path), "BGR"))["instances"]
    (found,) = OrtDetector(student.path).detect([path])
    assert found.input_size == (96, 128)
    assert_same_detections(found, expected)


@pytest.mark.parametrize("size", [(240, 320), (81, 108)])
def test_masks_are_pasted_as_default_predictor_does(tiny, tmp_path, size):
    student, path = tiny("Mask R-CNN"), tmp_path / "scene.png"
    Image.fromarray(draw_scene(np.random.default_rng(8), size)).save(path)
    expected = default_predictor(student)(read_image(str(path), "BGR"))["instances"]
    (found,) = OrtDetector(student.path, min_score=0.3).detect([path])
    assert len(found.scores) >= 5 and found.masks.shape == (len(found.scores), 14, 14)
    boxes = expected.pred_boxes.tensor.numpy()
    pixels = 0
    for mask, box, label in zip(found.bitmaps(), found.boxes, found.labels, strict=True):
        distance = np.abs(boxes - box).max(axis=1) + 1e6 * (expected.pred_classes.numpy() != label)
        wanted = expected.pred_masks[int(distance.argmin())].numpy()
        assert mask.shape == wanted.shape == size
        assert (mask != wanted).sum() <= 1 + wanted.sum() / 1000  # rounding at exactly one half
        pixels += wanted.sum()
    assert pixels > 1000, "vacuous: the masks are empty"


@pytest.mark.parametrize("size", [(150, 110), (300, 200), (77, 240), (64, 64)])
@pytest.mark.parametrize("fixture", ["dynamic_retinanet", "agnostic_rcnn"])
def test_any_size_on_a_dynamic_canvas_as_default_predictor(request, fixture, size):
    student = request.getfixturevalue(fixture)
    scene = draw_scene(np.random.default_rng(3), size).astype(np.uint8)
    expected = default_predictor(student)(scene)["instances"]
    (found,) = OrtDetector(student.path).detect([scene])
    assert found.size == size and not found.shrunk
    assert_same_detections(found, expected)


def test_swapped_channels_would_be_noticed(exported):
    """The comparison above can fail: the same scene with red and blue exchanged does."""
    student = exported("RetinaNet")
    scene = draw_scene(np.random.default_rng(7), (240, 320)).astype(np.uint8)
    expected = default_predictor(student)(scene)["instances"]
    (found,) = OrtDetector(student.path).detect([scene[:, :, ::-1]])
    with pytest.raises(AssertionError):
        assert_same_detections(found, expected)
