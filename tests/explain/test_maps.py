import gc
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cbam
from cbam.errors import ConfigError, InputError, MissingExtraError, NonFiniteError
from cbam.explain import energy_inside, gradcam
from cbam.explain.layers import default_layer
from cbam.explain.maps import METHODS

pytest.importorskip("torchcam", reason="Grad-CAM is torchcam's")


def scaled(maps, size):
    """Raw maps (N, h, w) -> what `gradcam` promises, written out again."""
    low, high = maps.flatten(1).min(1).values, maps.flatten(1).max(1).values
    unit = (maps - low[:, None, None]) / (high - low)[:, None, None]
    return F.interpolate(unit[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def by_hand(model, images, classes):
    """Activation and gradient of stage2 for the given classes, without torchcam."""
    activation = model.stage2(model.down(model.stage1(model.stem(images)))).detach().requires_grad_()
    scores = model.head(model.pool(activation).flatten(1))
    (gradient,) = torch.autograd.grad(scores.gather(1, torch.tensor(classes)[:, None]).sum(), activation)
    return activation.detach(), gradient


@pytest.mark.parametrize("method", METHODS)
def test_a_map_is_as_large_as_the_input_and_lies_in_0_to_1(build, images, method):
    maps = gradcam(build(), images, [0, 1, 2, 3], method=method)
    assert maps.shape == (4, 32, 24)
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert not maps.requires_grad


def test_gradcam_is_its_equation(build, images):
    model = build()
    activation, gradient = by_hand(model, images, [0, 1, 2, 3])
    raw = (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu()
    torch.testing.assert_close(gradcam(model, images, [0, 1, 2, 3]), scaled(raw, (32, 24)))


def test_gradcam_plus_plus_is_its_equation(build, images):
    model = build()
    a, g = by_hand(model.double(), images.double(), [0, 1, 2, 3])
    alpha = g**2 / (2 * g**2 + g**3 * a.sum((2, 3), keepdim=True))
    weights = (alpha * g.relu()).sum((2, 3), keepdim=True)
    maps = gradcam(model, images.double(), [0, 1, 2, 3], method="gradcam++")
    torch.testing.assert_close(maps, scaled((weights * a).sum(1).relu(), (32, 24)))


def test_layercam_is_its_equation(build, images):
    model = build()
    activation, gradient = by_hand(model, images, [4] * 4)
    maps = gradcam(model, images, 4, method="layercam")
    torch.testing.assert_close(maps, scaled((gradient.relu() * activation).sum(1).relu(), (32, 24)))


@pytest.mark.parametrize("layer", ["stage2", "stage1", "stage2.0.bn", "down"])
def test_gradcam_agrees_with_captum(build, images, layer):
    """`stage2.0.bn` is followed by an add in place, which must not reach into the recorded activation."""
    if importlib.util.find_spec("captum") is None:
        pytest.skip("captum is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's own
        from captum.attr import LayerGradCam

        model = build(lambda channels: None) if layer == "stage2.0.bn" else build()
        target = torch.tensor([0, 1, 2, 3])
        if layer == "stage2.0.bn":
            for block in (model.stage1, *model.stage2):
                block.forward = lambda x, b=block: torch.relu(
                    b.bn(b.conv(x)) + x
                )  # captum cannot see in place
        raw = LayerGradCam(model, model.get_submodule(layer)).attribute(
            images, target, relu_attributions=True
        )
        for module in model.modules():
            vars(module).pop("forward", None)
    torch.testing.assert_close(gradcam(model, images, target, layer), scaled(raw[:, 0].detach(), (32, 24)))


@pytest.mark.parametrize("method", METHODS)
def test_a_batched_map_equals_the_single_image_map(build, images, method):
    model = build()
    together = gradcam(model, images, [3, 1, 2, 0], method=method)
    alone = [gradcam(model, images[i : i + 1], c, method=method)[0] for i, c in enumerate([3, 1, 2, 0])]
    torch.testing.assert_close(together, torch.stack(alone), atol=2e-5, rtol=0)


def test_without_a_target_the_predicted_class_is_explained(build, images):
    model = build()
    predicted = model(images).argmax(1)
    assert torch.equal(gradcam(model, images), gradcam(model, images, predicted))
    assert torch.equal(gradcam(model, images, predicted), gradcam(model, images, predicted.tolist()))
    assert torch.equal(gradcam(model, images, np.int64(3)), gradcam(model, images, [np.int64(3)] * 4))
    other = (predicted + 1) % 5
    assert not torch.equal(gradcam(model, images), gradcam(model, images, other))


def test_the_model_is_left_as_it_was(build, images):
    model = build().train()
    model.stage1.eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.full_like(parameter, float(i)) if i % 3 == 0 else None
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    given = images.clone().requires_grad_()
    for method in METHODS:
        gradcam(model, given, method=method)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert given.grad is None
    for i, parameter in enumerate(model.parameters()):
        assert parameter.requires_grad == (i % 2 == 0)
        assert (
            torch.equal(parameter.grad, torch.full_like(parameter, float(i)))
            if i % 3 == 0
            else (parameter.grad is None)
        )


def test_the_model_is_left_as_it_was_when_it_raises(build, images):  # E7
    model = build().train()
    model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradcam(model, images, layer="stage1")
    with pytest.raises(ZeroDivisionError):
        gradcam(model, images)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert len(model.head._forward_pre_hooks) == 1


@pytest.mark.parametrize("scope", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_frozen_models_and_outer_scopes_do_not_matter(build, images, scope):  # E8
    model = build()
    expected = gradcam(model, images)
    model.requires_grad_(False)
    with scope():
        assert torch.equal(gradcam(model, images + 0), expected)
        assert torch.equal(gradcam(model, images.clone()), expected)


@pytest.mark.parametrize("scope", [torch.no_grad, torch.inference_mode])
def test_a_trunk_that_the_model_itself_runs_without_gradients_is_explained(build, images, scope):  # E8
    model = build()
    expected = gradcam(model, images)
    trunk = model.stage2.forward
    model.stage2.forward = lambda x: scope()(trunk)(x)
    assert torch.equal(gradcam(model, images), expected)


def test_half_precision_and_channels_last_models_are_explained(build, images):
    model = build()
    expected = gradcam(model, images, 0)
    nhwc = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(gradcam(nhwc, images, 0), expected, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert (gradcam(model, images, 0) - expected).abs().mean() < 0.1
    half = gradcam(model.bfloat16(), images.bfloat16(), 0)
    assert half.dtype == torch.float32
    assert (half - expected).abs().mean() < 0.1


def test_scores_are_found_in_an_output_that_holds_logits(build, images):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def forward(self, x):
            return SimpleNamespace(logits=self.net(x))

    model = Wrapped()
    assert torch.equal(gradcam(model, images, 1), gradcam(model.net, images, 1))


def test_a_constant_map_and_an_empty_one_are_zeros(build, plain, images):  # E9
    model = build()
    nn.init.zeros_(model.head.weight)
    assert gradcam(model, images).count_nonzero() == 0
    nn.init.ones_(plain.head.weight)
    plain.stage2.register_forward_hook(lambda m, a, out: 0 * out + 0.3)
    assert gradcam(plain, images).count_nonzero() == 0


def test_nan_is_an_error_and_not_a_map(build, images):  # E9
    images[1, 0, 5, 5] = torch.nan
    for method in METHODS:
        with pytest.raises(NonFiniteError, match="NaN"):
            gradcam(build(), images, 0, method=method)


def test_nan_in_one_channel_is_not_summed_away(build, images):  # E9
    model = build()
    model.stage2.register_forward_hook(lambda m, a, out: out.index_fill(1, torch.tensor(3), torch.nan))
    with pytest.raises(NonFiniteError, match="NaN"):
        gradcam(model, images, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_thousand_maps_leave_nothing_behind():  # E10
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    image = torch.randn(1, 3, 32, 32)

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(100):
        gradcam(model, image)
    before = resident()
    for _ in range(1000):
        gradcam(model, image)
    assert resident() - before < 5e6


def test_a_layer_is_taken_by_name_or_as_the_module(build, images):
    model = build()
    by_name = gradcam(model, images, layer="stage2.0")
    assert torch.equal(by_name, gradcam(model, images, layer=model.stage2[0]))
    assert not torch.equal(by_name, gradcam(model, images))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": "stage3"}, ConfigError, "no layer 'stage3'; did you mean stage"),
        ({"layer": nn.Conv2d(1, 1, 1)}, ConfigError, "no layer 'Conv2d'"),
        ({"layer": "head"}, InputError, r"'head' must return a feature map .* got shape \(4, 5\)"),
        ({"layer": "unused"}, InputError, "'unused' is not used in the forward pass"),
        ({"method": "grad-cam"}, ConfigError, r"unknown method 'grad-cam'; expected one of gradcam"),
        ({"target": 5}, InputError, r"target must be one class in 0\.\.4 or 4 of them"),
        ({"target": -1}, InputError, "target must be"),
        ({"target": [0, 1]}, InputError, "target must be"),
        ({"target": True}, InputError, "target must be"),
        ({"target": "1"}, InputError, "target must be"),
        ({"target": torch.tensor([0.5] * 4)}, InputError, "target must be"),
    ],
)
def test_mismatched_arguments_are_refused_with_a_reason(build, images, arguments, error, message):
    model = build()
    model.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(error, match=message):
        gradcam(model, images, **arguments)
    assert not any(m._forward_hooks for m in model.modules())


def test_images_that_are_not_a_normalised_batch_are_refused(build):
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 3, 8, 8)):
        with pytest.raises(InputError, match="normalised float batch"):
            gradcam(build(), wrong)


def test_images_on_another_device_than_the_model_are_refused(build, images):
    with pytest.raises(InputError, match="images are on cpu, the model on meta; move one"):
        gradcam(build().to("meta"), images)


def test_a_model_that_is_not_a_classifier_is_refused(images):
    with pytest.raises(InputError, match=r"scores \(N, classes\)"):
        gradcam(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images)


def test_a_missing_torchcam_is_named_with_its_pip_command(build, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcam", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cbam\[explain\]'"):
        gradcam(build(), images)


def test_energy_inside_a_box_is_its_share_of_the_map():
    maps = torch.zeros(4, 4, 6)
    maps[0] = 1  # uniform: the share of the area
    maps[1, 1, 2] = 5  # all in one pixel
    maps[2, 0, 0], maps[2, 3, 5] = 3, 1
    maps[3] = torch.arange(24.0).view(4, 6)
    boxes = torch.tensor([[0, 0, 3, 4], [2, 1, 3, 2], [0, 0, 1, 1], [1, 2, 4, 4]])
    expected = torch.tensor([0.5, 1.0, 0.75, float(maps[3, 2:4, 1:4].sum() / 276)], dtype=torch.float64)
    torch.testing.assert_close(energy_inside(maps, boxes), expected)


def test_a_pixel_counts_by_the_area_that_the_box_covers():
    maps = torch.ones(3, 4, 4)
    boxes = torch.tensor([[0.5, 0.25, 1.0, 1.0], [-3.0, -3.0, 2.5, 9.0], [1.2, 1.2, 1.4, 1.4]])
    expected = torch.tensor([0.5 * 0.75 / 16, 2.5 * 4 / 16, 0.04 / 16], dtype=torch.float64)
    torch.testing.assert_close(energy_inside(maps, boxes), expected, atol=1e-7, rtol=0)


def test_a_box_outside_the_map_holds_nothing_and_negative_values_are_no_energy():
    maps = torch.tensor([[[1.0, -5.0], [1.0, 2.0]]]).expand(2, 2, 2)
    boxes = torch.tensor([[10.0, 10, 20, 20], [0, 0, 2, 1]])
    assert energy_inside(maps, boxes).tolist() == [0, 0.25]


def test_energy_is_nan_where_the_map_is_empty_or_the_box_unknown():
    maps = torch.stack([torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 2)])
    boxes = torch.tensor([[0, 0, 1, 1], [torch.nan] * 4, [0, 0, 1, 1]])
    assert energy_inside(maps, boxes).isnan().tolist() == [True, True, False]
    assert energy_inside(maps, boxes)[2] == 0.25


def test_energy_refuses_what_cannot_be_measured():
    with pytest.raises(InputError, match=r"maps \(N, H, W\) and boxes \(N, 4\)"):
        energy_inside(torch.ones(2, 4, 4), torch.ones(3, 4))
    with pytest.raises(InputError, match="ends before it starts"):
        energy_inside(torch.ones(1, 4, 4), torch.tensor([[3, 0, 1, 4]]))
    with pytest.raises(NonFiniteError, match="NaN"):
        energy_inside(torch.full((1, 4, 4), torch.nan), torch.tensor([[0, 0, 1, 1]]))


def test_explain_imports_neither_torchcam_nor_matplotlib():
    extras = "{'torchcam', 'matplotlib', 'PIL', 'torchvision'}"
    code = f"import sys, cbam.explain; assert not {extras} & set(sys.modules)"
    root = Path(cbam.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


class Detector(nn.Module):
    """Boxes around the quarters of an image, each as probable as it is bright; labels 1 to 4."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.AdaptiveAvgPool2d(2)
        self.later = nn.Conv2d(4, 4, 1)  # a map behind the backbone, as of a region

    def forward(self, x):
        features = self.backbone(x)
        quarters = self.head(features).mean(1).flatten(1).sigmoid()
        self.later(features)
        return [
            {"boxes": x.new_zeros(4, 4), "labels": torch.tensor([1, 2, 3, 4]), "scores": quarters[i]}
            for i in range(len(x))
        ]


def test_a_detector_is_explained_by_the_scores_of_its_boxes():
    images = torch.randn(2, 3, 16, 16)
    model = Detector().eval()
    assert default_layer(model, images[:1]).name == "backbone.1"
    features = model.backbone(images).detach().requires_grad_()
    scores = model.head(features).mean(1).flatten(1).sigmoid()
    (gradient,) = torch.autograd.grad(scores[:, 2].sum(), features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    torch.testing.assert_close(gradcam(model, images, target=3), scaled(expected.detach(), images.shape[-2:]))


def test_two_boxes_of_one_class_add_up():
    from cbam.explain.watching import logits_of

    one = {
        "boxes": torch.zeros(3, 4),
        "labels": torch.tensor([2, 1, 2]),
        "scores": torch.tensor([0.5, 0.25, 0.125]),
    }
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    assert logits_of([one, none]).tolist() == [[0, 0.25, 0.625], [0, 0, 0]]


def test_a_detector_without_detections_and_scorecam_on_detectors_are_refused(monkeypatch):
    model, images = Detector().eval(), torch.randn(1, 3, 16, 16)
    with pytest.raises(ConfigError, match="choose another method for a detector"):
        gradcam(model, images, target=1, method="scorecam")
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x: [empty for _ in forward(x)])
    with pytest.raises(InputError, match="finds nothing"):
        gradcam(model, images)


class CutOff(Detector):
    """One whose scores keep no graph."""

    def forward(self, x):
        return [{key: value.detach() for key, value in one.items()} for one in super().forward(x)]


def test_a_detector_with_a_score_threshold_is_not_reported_as_finding_nothing():
    with pytest.raises(InputError, match=r"the class score does not depend on layer 'backbone\.1'"):
        gradcam(CutOff().eval(), torch.randn(1, 3, 16, 16), 1)


class SingleTrunk(nn.Module):
    """A detector of one box whose trunk is a single layer of that name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(3, 4, 3, padding=1))

    def forward(self, x):
        scores = self.get_submodule(self.name)(x).relu().mean((1, 2, 3))
        boxes, labels = x.new_tensor([[0, 0, 9, 9]]), torch.tensor([3])
        return [{"boxes": boxes, "labels": labels, "scores": score[None]} for score in scores]


def test_a_detector_trunk_may_be_one_layer_and_a_missing_trunk_is_reported():
    model, images = SingleTrunk("backbone").eval(), torch.randn(1, 3, 16, 16)
    assert default_layer(model, images).name == "backbone"
    assert gradcam(model, images, 3).shape == (1, 16, 16)
    other = SingleTrunk("trunk").eval()
    with pytest.raises(InputError, match="the detector has no `backbone` that returns a feature map; name a"):
        gradcam(other, images, 3)
    assert gradcam(other, images, 3, "trunk").shape == (1, 16, 16)


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detectors_of_torchvision_are_explained(name):
    detection = pytest.importorskip("torchvision.models.detection")
    model = detection.__dict__[name](weights=None, weights_backbone=None, num_classes=3).eval()
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        (found,) = model(images)
    if len(found["labels"]) == 0:
        model.roi_heads.score_thresh = 0.0
        with torch.no_grad():
            (found,) = model(images)
    assert default_layer(model, images).name.startswith("backbone.")
    heat = gradcam(model, images, int(found["labels"][0]))
    assert heat.shape == (1, 96, 96)
    assert heat.isfinite().all()
