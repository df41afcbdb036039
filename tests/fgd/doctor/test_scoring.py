import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

from fgd.doctor.scoring import ap50, detect, object_confidence

SQUARE, FAR = [10.0, 10, 30, 30], [60.0, 60, 80, 80]


def labelled(*boxes, classes=None):
    x = Instances((100, 100))
    x.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    x.gt_classes = torch.tensor(classes if classes is not None else [0] * len(boxes))
    return x


def detected(*rows):
    """Rows of (box, class, score)."""
    x = Instances((100, 100))
    x.pred_boxes = Boxes(torch.tensor([r[0] for r in rows], dtype=torch.float32).reshape(-1, 4))
    x.pred_classes = torch.tensor([r[1] for r in rows], dtype=torch.int64)
    x.scores = torch.tensor([r[2] for r in rows], dtype=torch.float32)
    return x


def test_ap50_of_cases_done_by_hand():
    truth = [labelled(SQUARE, FAR, classes=[0, 1])]
    shifted = [12.0, 10, 32, 30]  # IoU 18 / 22
    both = [detected((shifted, 0, 0.9), (FAR, 1, 0.8))]
    assert ap50(truth, both, True) == pytest.approx(100)
    wrong_class = [detected((SQUARE, 1, 0.9), (FAR, 1, 0.8))]
    # Class 0 finds nothing; class 1 has its hit second, with precision 1/2 at every recall.
    assert ap50(truth, wrong_class, True) == pytest.approx(25)
    assert ap50(truth, wrong_class, False) == pytest.approx(100)
    far_off = [detected(([10.0, 22, 30, 42], 0, 0.9))]  # IoU 8 / 32
    assert ap50([labelled(SQUARE)], far_off, True) == 0


def test_ap50_of_nothing():
    assert ap50([labelled(SQUARE)], [detected()], True) == 0
    assert math.isnan(ap50([labelled()], [detected((SQUARE, 0, 0.9))], True))


def test_images_do_not_lend_each_other_detections():
    truth = [labelled(SQUARE), labelled(FAR)]
    assert ap50(truth, [detected((FAR, 0, 0.9)), detected((SQUARE, 0, 0.9))], True) == 0


def test_confidence_is_the_best_score_that_found_each_object():
    truth = [labelled(SQUARE, FAR, classes=[0, 1]), labelled(), labelled(FAR)]
    found = [
        detected((SQUARE, 0, 0.4), (SQUARE, 0, 0.6), (FAR, 0, 0.9)),
        detected((FAR, 0, 0.9)),
        detected(),
    ]
    assert object_confidence(truth, found, True) == pytest.approx([0.3, 0.0])
    assert object_confidence(truth, found, False) == pytest.approx([0.75, 0.0])


def test_detect_gives_each_image_alone_and_flips_channels():
    seen = []

    def detector(inputs):
        (sample,) = inputs
        assert sample.keys() == {"image"}, "height and width would scale the boxes"
        seen.append(sample["image"][:, 0, 0].tolist())
        return [{"instances": detected((SQUARE, 0, 0.9))}]

    image = torch.arange(3.0).reshape(3, 1, 1).expand(3, 4, 4)
    samples = [{"image": image, "height": 400, "width": 400}] * 2
    assert len(detect(detector, samples, False)) == 2
    detect(detector, samples, True)
    assert seen == [[0, 1, 2]] * 2 + [[2, 1, 0]] * 2
    assert detect(lambda inputs: [{"sem_seg": image}], samples, False) is None
