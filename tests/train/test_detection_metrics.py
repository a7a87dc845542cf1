"""Average precision: by hand, by plain loops over the rules, and by COCO's own code."""

import math

import numpy as np
import pytest
import torch

from cbam.errors import DataError, InputError, NonFiniteError
from cbam.train.detection_metrics import COCO_NUMBERS, coco_numbers, voc_ap


def there(boxes, labels=None, **more):
    n = len(boxes)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(n, 4)
    own = {"boxes": boxes, "labels": torch.tensor(labels or [1] * n, dtype=torch.int64)}
    own["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    flags = {name: torch.tensor(more.get(name, [0] * n), dtype=torch.bool) for name in ("crowd", "difficult")}
    return own | flags


def found(boxes, scores, labels=None):
    own = there(boxes, labels)
    return {"boxes": own["boxes"], "labels": own["labels"], "scores": torch.tensor(scores)}


def random_scenes(seed, images=30, classes=3, integers=True):
    """Random objects and detections near some of them, with crowds and difficult ones."""
    random = np.random.default_rng(seed)

    def boxes(n):
        low = random.integers(0, 60, (n, 2))
        return np.concatenate([low, low + random.integers(2, 50, (n, 2)) * (1 if n % 2 else 3)], 1).astype(
            float
        )

    truth, detections = {}, {}
    for image in range(images):
        n, extra = random.integers(0, 6), random.integers(0, 5)
        own = there(boxes(n).tolist(), random.integers(1, classes + 1, n).tolist() or None,
                    crowd=random.random(n) < 0.2, difficult=random.random(n) < 0.3)  # fmt: skip
        near = own["boxes"].numpy() + random.integers(-6, 7, (n, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        all_boxes = np.concatenate([near, boxes(extra), near[:1]])
        labels = [
            *own["labels"].tolist(),
            *random.integers(1, classes + 1, extra),
            *own["labels"][:1].tolist(),
        ]
        scores = random.permutation(1000)[: len(all_boxes)] / 1000 + image / 1e5
        truth[7 * image] = own
        detections[7 * image] = found(all_boxes.tolist(), scores.tolist(), [int(label) for label in labels])
    return detections, truth


# VOC

A, B, C = [0, 0, 10, 10], [20, 20, 40, 30], [5, 5, 25, 25]


def test_the_ap_of_three_detections_is_that_computed_by_hand():
    """Recall 1/3, 1/3, 2/3 at precision 1, 1/2, 2/3."""
    truth = {1: there([A, B]), 2: there([C])}
    detections = {1: found([A, [50, 50, 60, 60]], [0.9, 0.8]), 2: found([C], [0.7])}
    assert voc_ap(detections, truth, ["x"]).mean == pytest.approx(100 * (1 / 3 + 2 / 9))
    assert voc_ap(detections, truth, ["x"], points="11").mean == pytest.approx(100 * (4 * 1 + 3 * 2 / 3) / 11)


@pytest.mark.parametrize(("first", "points"), [(2, 3), (3, 3), (4, 5), (6, 7), (7, 8), (9, 10)])
def test_recall_at_whole_tenths_reaches_its_point_except_three_tenths(first, points):
    """The kit uses MATLAB's 0:0.1:1, whose fourth value is 0.30000000000000004."""
    truth = {1: there([[20 * i, 0, 20 * i + 10, 10] for i in range(10)])}
    some = {1: found(truth[1]["boxes"][:first].tolist(), [0.9] * first)}
    assert voc_ap(some, truth, ["x"], points="11").mean == pytest.approx(100 * points / 11)


def test_an_object_is_matched_once():
    truth = {1: there([A, B])}
    twice = {1: found([A, A, B], [0.9, 0.8, 0.7])}
    assert voc_ap(twice, truth, ["x"]).mean == pytest.approx(100 * (1 / 2 + 1 / 2 * 2 / 3))


def test_a_detection_is_not_matched_to_its_second_best_object():
    """Both overlap the left object most; the kit counts the second as a false positive."""
    left, right = [0, 0, 10, 10], [1, 0, 11, 10]
    detections = {1: found([left, left], [0.9, 0.8])}
    assert voc_ap(detections, {1: there([left, right])}, ["x"]).mean == pytest.approx(50)


def test_difficult_objects_count_neither_as_misses_nor_as_false_positives():
    truth = {1: there([A, B], difficult=[0, 1])}
    assert voc_ap({1: found([A], [0.5])}, truth, ["x"]).mean == 100
    assert voc_ap({1: found([B, B, A], [0.9, 0.8, 0.5])}, truth, ["x"]).mean == 100
    only = {1: there([A], difficult=[1])}
    assert math.isnan(voc_ap({1: found([A], [0.5])}, only, ["x"]).mean)


@pytest.mark.parametrize(("height", "right"), [(10, True), (9, False)])
def test_an_iou_of_exactly_one_half_is_a_match(height, right):
    """The kit's pixels 1..20 x 1..10 against 1..10 x 1..10: widths 20 and 10, overlap 1/2."""
    truth = {1: there([[0, 0, 20, 10]])}
    assert voc_ap({1: found([[0, 0, 10, height]], [0.5])}, truth, ["x"]).mean == (100 if right else 0)


def test_a_class_without_objects_is_left_out_of_the_mean():
    truth = {1: there([A, B], [1, 2])}
    score = voc_ap({1: found([A, C], [0.5, 0.9], [1, 3])}, truth, ["a", "b", "c"])
    assert score.mean == 50
    assert score.classes == pytest.approx({"a": 100, "b": 0, "c": math.nan}, nan_ok=True)


def by_the_kit(detections, truth, label, points):
    """The kit's loops, on its own pixels that count from 1, with 1 added to widths."""

    def own(mapping, image, what):
        mine = mapping[image]["labels"] == label
        shifted = mapping[image]["boxes"][mine].numpy() + np.array([1, 1, 0, 0])
        return list(zip(shifted, mapping[image][what][mine].tolist(), strict=True))

    objects = {image: own(truth, image, "difficult") for image in truth}
    lines = [(score, image, box) for image in detections for box, score in own(detections, image, "scores")]
    taken, hits, misses = set(), [], []
    for _, image, box in sorted(lines, key=lambda line: -line[0]):
        best, most = None, -1.0
        for j, (other, _) in enumerate(objects[image]):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if width > 0 and height > 0:
                areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other)]
                overlap = width * height / (sum(areas) - width * height)
                if overlap > most:
                    best, most = j, overlap
        good = best is not None and most >= 0.5
        if good and objects[image][best][1]:
            hits.append(0), misses.append(0)
            continue
        hits.append(int(good and (image, best) not in taken))
        misses.append(1 - hits[-1])
        if good:
            taken.add((image, best))
    count = sum(not difficult for own in objects.values() for _, difficult in own)
    recall, tp, fp = np.cumsum(hits) / count, np.cumsum(hits), np.cumsum(misses)
    precision = tp / np.maximum(tp + fp, 1)
    if points == "11":
        tenths = [0, 0.1, 0.2, 0.30000000000000004, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]  # MATLAB's 0:0.1:1
        return sum(max(precision[recall >= t], default=0) for t in tenths) / 11 * 100
    recall, precision = np.array([0, *recall, 1]), np.array([0, *precision, 0])
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    change = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return sum((recall[change] - recall[change - 1]) * precision[change]) * 100


@pytest.mark.parametrize("points", ["area", "11"])
@pytest.mark.parametrize("seed", range(8))
def test_random_cases_are_scored_as_by_the_voc_kits_loops(seed, points):
    detections, truth = random_scenes(seed)
    score = voc_ap(detections, truth, ["a", "b", "c"], points=points)
    expected = [by_the_kit(detections, truth, label, points) for label in (1, 2, 3)]
    assert list(score.classes.values()) == pytest.approx(expected, abs=1e-9)
    assert 5 < score.mean < 95


def test_the_order_of_images_and_of_boxes_does_not_matter():
    detections, truth = random_scenes(3)
    turned = {i: {k: v.flip(0) for k, v in own.items()} for i, own in reversed(detections.items())}
    assert voc_ap(turned, truth, ["a", "b", "c"]).mean == pytest.approx(
        voc_ap(detections, truth, ["a", "b", "c"]).mean
    )


# both


@pytest.mark.parametrize("score", [coco_numbers, voc_ap])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["boxes", "scores"])
def test_a_nonfinite_detection_is_refused(score, place, bad):  # D27
    detections = {1: found([A], [0.5])}
    detections[1][place].view(-1)[0] = bad
    with pytest.raises(NonFiniteError, match="image 1: a detection has a box or a score that is not finite"):
        score(detections, {1: there([A])}, ["x"])


@pytest.mark.parametrize("detections", [{}, {1: found([], [])}])
def test_no_detections_score_0(detections):  # D28
    truth = {1: there([A]), 2: there([])}
    assert voc_ap(detections, truth, ["x"]).mean == 0
    numbers = coco_numbers(detections, truth, ["x"])
    assert numbers["AP"] == numbers["AR 100"] == 0


@pytest.mark.parametrize("score", [coco_numbers, voc_ap])
def test_unknown_images_and_labels_are_listed(score):  # D29
    with pytest.raises(DataError, match=r"not in the data set: 2, 9"):
        score({2: found([A], [0.5]), 9: found([A], [0.5])}, {1: there([A])}, ["x"])
    with pytest.raises(DataError, match=r"detections with labels that are not classes \(1 to 1\): 0, 4"):
        score({1: found([A, A], [0.5, 0.6], [4, 0])}, {1: there([A])}, ["x"])


@pytest.mark.parametrize("score", [coco_numbers, voc_ap])
def test_tensors_of_mismatched_shapes_are_refused(score):
    with pytest.raises(InputError, match=r"image 1: .* got \(1, 4\), \(2,\), \(1,\)"):
        score({1: found([A], [0.5]) | {"scores": torch.ones(2)}}, {1: there([A])}, ["x"])


def test_an_unknown_number_of_points_is_refused():
    with pytest.raises(InputError, match='points must be "area" or "11"'):
        voc_ap({}, {1: there([A])}, ["x"], points="101")


def test_perfect_detections_score_100():
    _, truth = random_scenes(1)
    truth = {i: own | {"crowd": own["crowd"] & False} for i, own in truth.items()}
    perfect = {i: own | {"scores": torch.rand(len(own["labels"]))} for i, own in truth.items()}
    for points in ("area", "11"):
        assert voc_ap(perfect, truth, ["a", "b", "c"], points=points).mean == pytest.approx(100)
    numbers = coco_numbers(perfect, truth, ["a", "b", "c"])
    assert [numbers[name] for name in ("AP", "AP50", "AP75", "AR 100")] == pytest.approx([100] * 4)


def crowded_scenes(seed):
    """More detections than are counted, many with equal scores, on objects of every size, some duplicated."""
    random = np.random.default_rng(seed)
    truth, detections = {}, {}
    for image in range(6):
        low = random.integers(0, 200, (40, 2))
        sides = random.choice([8, 30, 31, 32, 33, 96, 97, 200], (40, 2))
        objects = np.concatenate([low, low + sides], 1).astype(float)
        objects[30:] = objects[:10]
        labels = random.integers(1, 3, 40).tolist()
        near = np.repeat(objects, 8, 0)
        near[::2] += random.integers(-3, 4, (160, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        truth[image] = there(objects.tolist(), labels, crowd=random.random(40) < 0.2)
        # An unstable sort would reorder detections with equal scores.
        scores = random.integers(0, 40, len(near)) / 40
        detections[image] = found(near.tolist(), scores.tolist(), np.repeat(labels, 8).tolist())
    return detections, truth


def as_coco(detections, truth, classes):
    """The same as a COCO data set and a list of COCO results."""
    objects, results = [], []
    for image, own in truth.items():
        for box, label, area, crowd in zip(
            *(own[k].tolist() for k in ("boxes", "labels", "area", "crowd")), strict=True
        ):
            sides = [*box[:2], box[2] - box[0], box[3] - box[1]]
            objects.append({"id": len(objects) + 1, "image_id": image, "category_id": label, "bbox": sides,
                            "area": area, "iscrowd": int(crowd)})  # fmt: skip
    for image, own in detections.items():
        for box, label, score in zip(*(own[k].tolist() for k in ("boxes", "labels", "scores")), strict=True):
            sides = [*box[:2], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": image, "category_id": label, "bbox": sides, "score": score})
    dataset = {"images": [{"id": i} for i in truth], "annotations": objects,
               "categories": [{"id": k} for k in range(1, classes + 1)], "info": {}}  # fmt: skip
    return dataset, results


def by_pycocotools(dataset, results):
    theirs = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    from pycocotools.cocoeval import COCOeval

    oracle = theirs.COCO()
    oracle.dataset = dataset
    oracle.createIndex()
    return COCOeval(oracle, oracle.loadRes(results), "bbox")


def by_faster_coco_eval(dataset, results):
    theirs = pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    oracle = theirs.COCO(dataset)
    return theirs.COCOeval_faster(oracle, oracle.loadRes(results), "bbox", extra_calc=False)


@pytest.mark.parametrize("oracle", [by_pycocotools, by_faster_coco_eval])
@pytest.mark.parametrize("make", [random_scenes, crowded_scenes])
@pytest.mark.parametrize("seed", range(4))
def test_the_twelve_coco_numbers_equal_those_of_the_reference_code(seed, make, oracle, capsys):
    detections, truth = make(seed)
    for own in truth.values():
        own["area"] *= 0.6  # as of masks, which are smaller than their boxes
    evaluation = oracle(*as_coco(detections, truth, 3))
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    stats = getattr(evaluation, "all_stats", evaluation.stats)[:12]
    expected = {n: 100 * v if v >= 0 else math.nan for n, v in zip(COCO_NUMBERS, stats, strict=True)}
    capsys.readouterr()
    assert coco_numbers(detections, truth, ["a", "b", "c"]) == pytest.approx(expected, nan_ok=True, abs=1e-9)
    assert capsys.readouterr().out == ""
    assert 1 < expected["AP"] < 99


def test_5000_images_of_coco_are_scored_in_two_seconds():
    """CPU time, 0.5 s when it was written; 20 detections of 80 classes per image."""
    import time

    torch.manual_seed(0)
    classes = [str(k) for k in range(80)]

    def boxes(n):
        corner = 400 * torch.rand(n, 2)
        return torch.cat([corner, corner + 4 + 150 * torch.rand(n, 2)], 1)

    truth = {i: there(boxes(7).tolist(), torch.randint(1, 81, (7,)).tolist()) for i in range(5000)}
    detections = {}
    for i, own in truth.items():
        near, labels = own["boxes"] + 5 * torch.randn(7, 4), torch.randint(1, 81, (13,))
        detections[i] = {
            "boxes": torch.cat([near, boxes(13)]),
            "labels": torch.cat([own["labels"], labels]),
            "scores": torch.rand(20),
        }
    began = time.process_time()
    assert 5 < coco_numbers(detections, truth, classes)["AP"] < 50
    assert time.process_time() - began < 2


def test_all_voc_metrics_together_take_under_two_seconds():
    """CPU time, 0.4 s when it was written; 200 detections of 20 classes per image."""
    import time

    from cbam.train.detection import Detection

    torch.manual_seed(0)
    classes = [str(k) for k in range(20)]
    truth, detections = {}, {}
    for i in range(2000):
        corner = 400 * torch.rand(3, 2)
        truth[i] = there(torch.cat([corner, corner + 100], 1).tolist(), torch.randint(1, 21, (3,)).tolist())
        near = torch.arange(200) % 3
        detections[i] = {
            "boxes": truth[i]["boxes"][near] + 9 * torch.randn(200, 4),
            "labels": truth[i]["labels"][near],
            "scores": torch.rand(200),
        }
    began = time.process_time()
    scores = Detection(torch.nn.Identity(), classes, "voc").scores((detections, truth))
    assert time.process_time() - began < 2
    assert scores["val_ap50"] == voc_ap(detections, truth, classes).mean
    assert scores["val_ap75"] == voc_ap(detections, truth, classes, iou=0.75).mean
    assert scores["val_ap50_11points"] == voc_ap(detections, truth, classes, points="11").mean
    assert 0 < scores["val_ap75"] < scores["val_ap"] < scores["val_ap50"]


@pytest.mark.parametrize("first", [1, 2])
def test_a_missing_area_is_that_of_the_box(first):
    truth = {image: there([[0, 0, 40, 40]]) for image in (first, 3 - first)}
    stated = coco_numbers({1: found([[0, 0, 40, 40]], [0.9])}, truth, ["x"])
    del truth[2]["area"]
    assert coco_numbers({1: found([[0, 0, 40, 40]], [0.9])}, truth, ["x"]) == pytest.approx(
        stated, nan_ok=True
    )


def test_chunked_matching_gives_the_same_numbers(monkeypatch):
    from cbam.train import coco_protocol

    detections, truth = crowded_scenes(0)
    whole = coco_numbers(detections, truth, ["a", "b", "c"])
    monkeypatch.setattr(coco_protocol, "_CHUNK", 100)
    assert coco_numbers(detections, truth, ["a", "b", "c"]) == pytest.approx(whole, nan_ok=True, abs=0)


def test_two_classes_with_one_name_count_as_two_in_the_mean():
    boxes = torch.tensor([[0.0, 0, 5, 5], [10.0, 10, 20, 20]])
    there = {0: {"boxes": boxes, "labels": torch.tensor([1, 2]), "difficult": torch.zeros(2)}}
    found = {0: {"boxes": boxes[:1], "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}}
    assert voc_ap(found, there, ["cat", "cat"]).mean == voc_ap(found, there, ["cat", "dog"]).mean == 50
