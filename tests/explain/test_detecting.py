"""What detectors find, and the evidence for one box of theirs."""

import pytest
import torch
from torch import nn

from cbam.errors import ConfigError, DataError, InputError, NonFiniteError
from cbam.explain import energy_inside, gradcam
from cbam.explain.detecting import Detectors, detect, gradcam_of_box
from cbam.explain.outlines import detection_figure

pytest.importorskip("torchcam", reason="Grad-CAM is torchcam's")
pytest.importorskip("torchvision", reason="overlaps are torchvision's")


class Quarters(nn.Module):
    """Finds each quarter of an image, by its brightness in one colour; label k is channel k."""

    def __init__(self, order=(0, 1, 2, 3)) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU())
        self.order = list(order)
        with torch.no_grad():
            self.backbone[0].weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, images):
        found = []
        for image in images:
            features = self.backbone(image[None])[0]
            h, w = (side // 2 for side in image.shape[1:])
            parts = [features[:, y : y + h, x : x + w] for y in (0, h) for x in (0, w)]
            boxes = torch.tensor([[x, y, x + w, y + h] for y in (0, h) for x in (0, w)]).float()
            means = torch.stack([part.mean((1, 2)) for part in parts])
            scores, labels = means.max(1)
            one = {"boxes": boxes, "labels": labels + 1, "scores": scores}
            found.append({key: value[self.order] for key, value in one.items()})
        return found


def coloured():
    """Red, green and blue, each in a quarter and less and less bright; the fourth is dark."""
    picture = torch.zeros(3, 16, 24, dtype=torch.uint8)
    for channel, (y, x), value in ((0, (0, 0), 240), (1, (0, 12), 220), (2, (8, 0), 200)):
        picture[channel, y : y + 8, x : x + 12] = value
    return picture


CLASSES = ["red", "green", "blue"]


def test_labels_with_the_same_name_are_distinguished_by_number():
    seen = detect(Detectors({"plain": Quarters()}, ["cell", "cell", "blue"]), coloured())
    assert [seen.class_of(label) for label in seen.finds[0].labels] == ["cell (1)", "cell (2)", "blue"]
    assert seen.class_of(torch.tensor(4)) == "label 4"


def looked(*models, picture=None, **how):
    names = ("plain", "cbam", "third")
    detectors = Detectors(dict(zip(names, models, strict=False)), CLASSES)
    return detect(detectors, coloured() if picture is None else picture, "an image", **how)


def test_boxes_come_with_the_most_certain_first_and_weak_ones_are_left_out():
    (finds,) = looked(Quarters(order=(3, 1, 2, 0))).finds
    assert finds.labels.tolist() == [1, 2, 3]
    assert finds.scores.tolist() == sorted(finds.scores.tolist(), reverse=True)
    assert finds.boxes[0].tolist() == [0, 0, 12, 8]
    (finds,) = looked(Quarters(), threshold=0.9).finds
    assert finds.labels.tolist() == [1]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "layercam"])
def test_the_evidence_for_a_box_lies_in_it(number, method):
    seen = looked(Quarters(), box=number, method=method)
    (finds,) = seen.finds
    assert finds.chosen == number - 1
    assert finds.heat.shape == (16, 24)
    assert float(energy_inside(finds.heat[None], finds.boxes[number - 1 : number])[0]) > 0.95


def test_the_other_detector_shows_the_same_object_under_any_number():
    class Dimmed(Quarters):
        def forward(self, images):
            found = super().forward(images)
            for one in found:  # red becomes the least certain
                one["scores"] = torch.where(one["labels"] == 1, one["scores"] - 0.3, one["scores"])
            return found

    plain, other = looked(Quarters(), Dimmed()).finds
    assert (plain.chosen, other.chosen) == (0, 2)
    assert plain.labels[0] == other.labels[2] == 1
    torch.testing.assert_close(plain.heat, other.heat)


def test_an_object_that_the_other_misses_has_no_evidence_there():
    class Blind(Quarters):
        def forward(self, images):
            return [{k: v[one["labels"] != 1] for k, v in one.items()} for one in super().forward(images)]

    plain, other = looked(Quarters(), Blind()).finds
    assert plain.chosen == 0
    assert (other.chosen, other.heat) == (None, None)
    # The box is one of the first detector that finds anything.
    dark = torch.zeros(3, 16, 24, dtype=torch.uint8)
    assert all(one.chosen is None for one in looked(Quarters(), picture=dark).finds)
    blind, seeing = looked(Blind(), Quarters(), box=1).finds
    assert CLASSES[int(blind.labels[0]) - 1] == CLASSES[int(seeing.labels[seeing.chosen]) - 1] == "green"


def test_there_may_be_fewer_boxes_than_requested():
    assert looked(Quarters(), box=4).finds[0].heat is None


def test_a_map_is_that_of_the_image_and_not_of_its_padding():
    """torchvision pads 40 x 56 to 64 x 64, and the map of its last layer with it."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transform = GeneralizedRCNNTransform(40, 100, [0.0] * 3, [1.0] * 3)
            self.backbone = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(3, 1, 1, bias=False), nn.ReLU())
            nn.init.constant_(self.backbone[1].weight, 0.3)

        def forward(self, images):
            inside, _ = self.transform(list(images))
            features = self.backbone(inside.tensors)
            score = features.amax((1, 2, 3))
            box = torch.tensor([[0.0, 0.0, 56.0, 40.0]])
            return [{"boxes": box, "labels": torch.tensor([1]), "scores": s[None]} for s in score]

    picture = torch.zeros(3, 40, 56)
    picture[:, 32:, 48:] = 0.9  # the last cell
    heat = gradcam_of_box(Padded().eval(), picture, torch.tensor([0.0, 0.0, 56.0, 40.0]), 1)
    assert heat.shape == (40, 56)
    assert float(energy_inside(heat[None], torch.tensor([[44.0, 28.0, 56.0, 40.0]]))[0]) > 0.99
    assert heat[-1, -1] == 1
    model = Padded().eval()
    assert torch.equal(gradcam(model, picture[None], 1)[0], heat)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("fasterrcnn:resnet18+cbam", ("backbone.fpn.layer_blocks.",)),
        ("retinanet:resnet18", ("backbone.fpn.",)),
        pytest.param("ssd300:vgg16", ("backbone.features", "backbone.extra."), marks=pytest.mark.large),
        ("stairnet300:mobilenet_v1+cbam", ("backbone.smooth.",)),
    ],
)
def test_the_evidence_is_looked_for_where_a_detector_reads_its_box(name, places, monkeypatch):
    import cbam.explain.detecting as module
    from cbam.models import detector

    asked = []
    whole = module.gradcam_at
    monkeypatch.setattr(module, "gradcam_at", lambda *a: (asked.append(a[3].name), whole(*a))[1])
    torch.manual_seed(0)
    model = detector(name, num_classes=3)
    if not model.transform.fixed_size:
        model.transform.min_size = (64,)
    model.score_thresh = 0.0  # RetinaNet begins with scores near 0.01
    if "fasterrcnn" in name:
        model.rpn._post_nms_top_n = {"training": 50, "testing": 50}
    picture = (torch.rand(3, 60, 96) * 255).byte()
    seen = detect(Detectors({"plain": model}, CLASSES), picture, threshold=0.0)
    (finds,) = seen.finds
    assert finds.heat.shape == (60, 96)
    assert finds.heat.isfinite().all()
    assert asked[0].removeprefix("detector.").startswith(places)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())  # E7
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_hooks_and_mode_are_restored_when_a_detector_raises():  # E7
    model = Quarters()
    (finds,) = looked(model).finds
    with pytest.raises(InputError, match="does not find this box"):
        gradcam_of_box(model, coloured() / 255, torch.tensor([0.0, 0, 2, 2]), 1)
    with pytest.raises(InputError, match="does not find this box"):
        gradcam_of_box(model, coloured() / 255, finds.boxes[0], 3)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_frozen_detectors_and_inference_mode_do_not_matter():  # E8
    expected = looked(Quarters()).finds[0].heat
    frozen = Quarters().requires_grad_(False)
    with torch.inference_mode():
        assert torch.equal(looked(frozen).finds[0].heat, expected)


def test_invalid_input_is_refused():
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    with pytest.raises(InputError, match=r"uint8 \(3, H, W\)"):
        looked(Quarters(), picture=torch.rand(3, 8, 8))
    with pytest.raises(ConfigError, match="scorecam needs the scores of a classifier"):
        looked(Quarters(), method="scorecam")
    with pytest.raises(ConfigError, match="no layer 'nowhere'"):
        looked(Quarters(), layer="nowhere")
    with pytest.raises(InputError, match="images are on cpu, the model on meta; move one of them"):
        looked(Quarters().to("meta"))
    with pytest.raises(InputError, match="must return a dict of boxes, labels and scores"):
        looked(nn.Identity())
    model = Quarters()
    with torch.no_grad():
        model.backbone[0].weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="plain: the detector outputs NaN"):  # D27
        looked(model)
    model.transform = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3)
    with pytest.raises(DataError, match="an image: 20000 x 1 pixels are too narrow"):  # D11
        looked(model, picture=torch.zeros(3, 1, 20_000, dtype=torch.uint8))


@pytest.fixture
def two():
    plain, other = Quarters(), Quarters(order=(3, 2, 1, 0))
    return [looked(plain, other), looked(plain, other, picture=coloured().flip(2))]


def test_the_figure_says_numbers_classes_and_scores(two, tmp_path):
    pytest.importorskip("matplotlib", reason="figures are matplotlib's")
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # words stay words
        text = detection_figure(two, tmp_path / "a.svg").read_text()
    for words in ("1 red 0.94", "2 green 0.86", "red, green, blue", "plain finds", "LayerCAM of a box"):
        assert words in text
    assert detection_figure(two, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    again = detection_figure(two, tmp_path / "b.png").read_bytes()
    assert again == (tmp_path / "a.png").read_bytes()


def test_words_lie_in_the_image_and_not_on_each_other():
    from cbam.explain.outlines import _free_position, _overlap

    torch.manual_seed(0)
    taken = []
    for _ in range(60):
        x, y = (100 * torch.rand(2)).tolist()
        box = (x, y, x + 20, y + 20)
        place = _free_position(box, "1 triangle 0.98", 60.0, (110, 120), taken)
        if place is not None:
            assert 0 <= place[0] < place[2] <= 120
            assert 0 <= place[1] < place[3] <= 110
            assert not any(_overlap(place, other) for other in taken)
            taken.append(place)
    assert 3 < len(taken) < 60


@pytest.mark.parametrize("models", [(Quarters(),), (Quarters(), Quarters())])
def test_captions_do_not_overlap_the_colour_bar(models):
    from cbam.explain.outlines import _Rows

    seen = looked(*models)
    figure = _Rows([seen], [one.network for one in seen.finds]).figure
    figure.draw_without_rendering()
    (bar,) = [ax.get_window_extent() for ax in figure.axes if not ax.images]
    words = [text.get_window_extent() for text in figure.texts if "box" in text.get_text()]
    below = [box for box in words if box.y1 < bar.y1 + 5]
    assert below
    assert all(box.x1 < bar.x0 for box in below)


def test_large_images_are_drawn_small_and_odd_ones_at_all(tmp_path):
    pytest.importorskip("matplotlib", reason="figures are matplotlib's")
    from cbam.explain.outlines import _MAX_SIDE, _downscaled

    large = coloured().repeat_interleave(100, 1).repeat_interleave(100, 2)
    seen = looked(Quarters(), picture=large)
    small = _downscaled(seen)
    assert max(small.image.shape) == _MAX_SIDE
    assert small.finds[0].heat.shape == small.image.shape[1:]
    torch.testing.assert_close(small.finds[0].boxes, seen.finds[0].boxes * _MAX_SIDE / 2400)
    narrow = [looked(Quarters(), picture=coloured()[:, :, :4]), looked(Quarters(), picture=coloured()[:, :4])]
    assert detection_figure([seen, *narrow], tmp_path / "a.png").exists()


def test_a_figure_of_nothing_or_of_other_detectors_is_refused(two, tmp_path):
    with pytest.raises(InputError, match="no image"):
        detection_figure([], tmp_path / "a.png")
    with pytest.raises(InputError, match="different detectors"):
        detection_figure([two[0], looked(Quarters())], tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"a\.gif"):
        detection_figure(two, tmp_path / "a.gif")
