import numpy as np
import pytest

from fgd.study.bootstrap import (
    ALL,
    change,
    compare,
    replicates,
    resampled_sets,
    size_replicates,
)
from fgd.study.classes import changed_parts
from fgd.study.comparisons import correct, holm
from fgd.study.matches import index_truth, match

IMAGES = 40


def planted(rate, seed):
    """A model that finds each image's only object exactly with this probability, else a corner."""
    random = np.random.default_rng(seed)
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    detections = []
    for i in range(1, IMAGES + 1):
        truth["images"].append({"id": i, "width": 64, "height": 64})
        fields = {"id": i, "image_id": i, "category_id": 1, "area": 400, "iscrowd": 0}
        truth["annotations"].append({**fields, "bbox": [10, 10, 20, 20]})
        box = [10, 10, 20, 20] if random.random() < rate else [40, 40, 20, 20]
        score = float(random.random())
        detections.append({"image_id": i, "category_id": 1, "bbox": box, "score": score})
    return match(index_truth(truth), detections, "bbox")


@pytest.fixture(scope="module")
def sets():
    return resampled_sets(IMAGES, 300)


def test_sets_are_the_real_one_and_reproducible_draws(sets):
    assert (sets[0] == 1).all() and (sets.sum(axis=1) == IMAGES).all()
    np.testing.assert_array_equal(sets, resampled_sets(IMAGES, 300))
    assert (sets[1:] != resampled_sets(IMAGES, 300, seed=1)[1:]).any()
    assert sets[1:].std() == pytest.approx(1, abs=0.05)  # of a Poisson, nearly


def test_the_same_model_has_not_changed(sets):
    same = replicates(planted(0.6, 0), sets)
    found = change([same[ALL]], [same[ALL]])
    assert found.difference == found.low == found.high == 0 and found.p == 1


def test_a_clearly_better_model_is_found_and_the_sign_is_right(sets):
    good, bad = (replicates(planted(rate, 1), sets) for rate in (0.95, 0.3))
    better, worse = change([good[ALL]], [bad[ALL]]), change([bad[ALL]], [good[ALL]])
    assert 0 < better.low < better.difference < better.high
    assert better.p == pytest.approx(2 / 301)  # the smallest there is
    assert worse.high < 0 and worse.difference == -better.difference and worse.p == better.p


def test_chance_is_called_so(sets):
    """Models of one quality on their own luck: about 5 % of such tests may say otherwise."""
    models = [replicates(planted(0.6, seed), sets)[ALL] for seed in range(2, 22)]
    found = [change([a], [b]) for a, b in zip(models[::2], models[1::2])]
    assert sum(f.low <= 0 <= f.high for f in found) >= 8
    assert sum(f.p > 0.05 for f in found) >= 8


def test_it_is_paired(sets):
    """A small gain on every hard image is certain, though both models vary a lot over images."""
    random = np.random.default_rng(0)
    level = 100 * random.random(301)
    found = change([level + 1], [level])
    assert found.low == pytest.approx(1) and found.high == pytest.approx(1) and found.p < 0.01


def test_of_seeds_alone_it_is_the_t_test():
    """Images that do not matter: mean 2 and deviation 1 of three seeds, t = 2 sqrt(3) = 3.46."""
    a = [np.full(20001, 10.0 + x) for x in (1, 2, 3)]
    found = change(a, [np.full(20001, 10.0)] * 3)
    assert found.difference == 2
    half = 4.3027 / 3**0.5  # the 97.5 % quantile of Student's t with 2 degrees of freedom
    assert found.low == pytest.approx(2 - half, abs=0.1)
    assert found.high == pytest.approx(2 + half, abs=0.1)
    assert found.p == pytest.approx(0.0742, abs=0.006)


def test_seeds_that_agree_add_nothing_and_one_seed_says_nothing_of_others():
    a = [np.array([10.0, 11, 9]), np.array([20.0, 21, 19])]
    b = [np.array([8.0, 8, 8]), np.array([18.0, 18, 18])]
    assert change(a, b) == change(a[:1], b[:1])


@pytest.mark.parametrize(("seeds", "of_seed", "of_image"), [(3, 1, 0.3), (2, 1, 1), (5, 0.3, 1)])
def test_equal_methods_are_told_apart_in_five_percent_of_studies(seeds, of_seed, of_image):
    """200 studies of two methods that are equally good, each with its luck of seeds and images.

    Over images alone, as with one seed, up to half of them would claim a difference.
    """
    random, false, naive = np.random.default_rng(seeds), 0, 0
    for _ in range(200):
        own = random.normal(0, of_seed, seeds)[:, None] + random.normal(0, of_image)
        sets = np.concatenate([[0.0], random.normal(0, of_image, 400)])
        difference = own + sets
        false += change(difference, 0 * difference).p <= 0.05
        naive += change(difference[:1], 0 * difference[:1]).p <= 0.05
    assert false <= 17  # 5 % are 10 ± 3; beyond this with a chance of 1 %
    assert naive > false


def test_a_class_that_one_model_loses_is_the_one_that_is_named():
    """Student and distilled are equal but for one of six classes, on images and seeds of luck."""
    random, of_runs = np.random.default_rng(0), {}
    names = [f"class {i}" for i in range(6)]
    images = random.normal(0, 1, (6, 2001))
    for arm in ("teacher", "student", "distil"):
        for seed in range(1 if arm == "teacher" else 3):
            values = 50 + images + random.normal(0, 0.5, (6, 1))
            values[2] -= 15 * (arm == "distil")
            of_runs[arm, seed] = {ALL: values.mean(axis=0), **dict(zip(names, values, strict=True))}
    pairs = [("distil", "student"), ("student", "teacher"), ("distil", "teacher")]
    rows = correct({"bbox": compare(of_runs, pairs)})["bbox"]
    counts = [changed_parts(rows, *pair) for pair in pairs]
    assert [str(x) for x in counts] == ["1 of 6 (−1)", "0 of 6", "1 of 6 (−1)"]
    assert counts[0].behind == counts[2].behind == ["class 2"]
    overall = [(row["arm"], row["against"]) for row in rows if row["class"] == ALL]
    assert overall == pairs[:1]  # that a teacher is better over all is no question


@pytest.mark.parametrize(
    ("part", "names"), [("size", ["small", "medium", "large"]), ("class", ["a", "b", "c", "d"])]
)
def test_equal_models_differ_in_five_percent_of_studies_at_most(part, names):
    """200 studies of three seeds, in any of the classes or sizes together, after Holm."""
    random, false, naive = np.random.default_rng(0), 0, 0
    for _ in range(200):
        of_runs = {}
        sets = random.normal(0, 0.3, (2, len(names), 401))
        sets[:, :, 0] = 0
        for i, arm in enumerate(("distil", "student")):
            luck = random.normal(0, 0.3, (len(names), 1))
            for seed in range(3):
                values = 50 + sets[i] + luck + random.normal(0, 1, (len(names), 1))
                of_runs[arm, seed] = dict(zip(names, values, strict=True))
        rows = correct({"bbox": compare(of_runs, [("distil", "student")], part)})["bbox"]
        counted = changed_parts(rows, "distil", "student")
        false += bool(counted.ahead or counted.behind)
        naive += any(row["p"] <= 0.05 for row in rows)
    assert false <= 17  # 5 % are 10 ± 3; beyond this with a chance of 1 %
    assert naive > false


def test_a_size_that_one_model_loses_is_the_one_that_is_named(sets):
    """Small objects are found by both, medium ones by the student alone; none is large."""
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "medium"}]}
    random, found = np.random.default_rng(0), {"student": [], "distil": []}
    for i in range(1, IMAGES + 1):
        truth["images"].append({"id": i, "width": 99, "height": 99})
        for k, side in enumerate((20, 40)):
            box, number = [50 * k, 0, side, side], 2 * i + k
            fields = {"id": number, "image_id": i, "category_id": 1, "iscrowd": 0}
            truth["annotations"].append({**fields, "bbox": box, "area": side**2})
            for arm, entries in found.items():
                if random.random() < (0.2 if (arm, k) == ("distil", 1) else 0.8):
                    score = float(random.random())
                    entries.append({"image_id": i, "category_id": 1, "bbox": box, "score": score})
    index = index_truth(truth)
    of_runs = {
        (arm, 0): size_replicates(match(index, entries, "bbox"), sets)
        for arm, entries in found.items()
    }
    rows = correct({"bbox": compare(of_runs, [("distil", "student")], "size")})["bbox"]
    counted = changed_parts(rows, "distil", "student")
    assert counted == ([], ["medium"], 2) and str(counted) == "1 of 2 (−1)"
    assert [row["corrected"] for row in rows[:2]] == holm([row["p"] for row in rows[:2]])


def test_sets_without_the_class_do_not_count():
    found = change([np.array([5.0, np.nan, 6, 4])], [np.array([1.0, np.nan, 1, 1])])
    assert found.difference == 4 and 3 <= found.low < found.high <= 5
    assert np.isnan(change([np.full(4, np.nan)], [np.full(4, np.nan)])).all()


def test_compare_uses_the_seeds_that_both_arms_have():
    of_runs = {
        (arm, seed): {ALL: np.full(3, value + seed), "thing": np.full(3, value)}
        for arm, seed, value in (("a", 0, 5.0), ("a", 1, 7.0), ("b", 1, 1.0), ("b", 2, 9.0))
    }
    rows = compare(of_runs, [("a", "b"), ("a", "missing")])
    assert [(r["class"], r["seeds"], r["difference"]) for r in rows] == [
        (ALL, [1], 6),
        ("thing", [1], 6),
    ]
