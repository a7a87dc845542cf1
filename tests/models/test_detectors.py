"""Detectors over plain networks and ones with attention."""

import copy

import pytest
import torch

from cbam import ops
from cbam.errors import ConfigError, InputError
from cbam.models import build, detector, faster_rcnn, faster_rcnn_c4, freeze_norm, retinanet
from cbam.models.detectors import DETECTORS, TimmMaps
from cbam.nn import CBAM, ChannelAttention
from cbam.ops import cpu
from cbam.surgery import attach, attached, detach, load_weights

# millions of parameters, as CBAM's table 7 prints them, of 20 classes and the background
TABLE_7 = {
    "ssd300:vgg16": (26_515_936, "26.5"),
    "stairnet300:vgg16": (31_999_968, "32.0"),
    "stairnet300:vgg16+se": (32_050_752, "32.1"),
    "stairnet300:vgg16+cbam": (32_051_352, "32.1"),
    "ssd300:mobilenet_v1": (5_813_536, "5.81"),
    "stairnet300:mobilenet_v1": (5_981_600, "5.98"),
    "stairnet300:mobilenet_v1+se": (5_994_704, "5.99"),
    "stairnet300:mobilenet_v1+cbam": (5_995_304, "6.00"),
}


@pytest.mark.parametrize("name", TABLE_7)
def test_parameters_are_those_of_table_7_to_the_last_printed_digit(name):
    with torch.device("meta"):
        model = detector(name, num_classes=20)
    count, printed = TABLE_7[name]
    assert sum(p.numel() for p in model.parameters()) == count
    assert f"{count / 1e6:.{len(printed.partition('.')[2])}f}" == printed


def pictures():
    return [torch.rand(3, 64, 80), torch.rand(3, 48, 48)]


def targets():
    boxes = torch.tensor([[8.0, 8.0, 40.0, 44.0]])
    return [
        {"boxes": boxes, "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]


def small(name, **more):
    """A detector that works on the images at nearly their size."""
    model = detector(name, num_classes=3, **more)
    if not name.startswith(("ssd300", "stairnet300")):
        model.transform.min_size, model.transform.max_size = (64,), 96
    for key, weight in model.named_parameters():
        if key.endswith((".bn2.weight", ".bn3.weight")):  # timm's begin at 0, where no branch learns
            torch.nn.init.ones_(weight)
    if name.startswith("fasterrcnn"):
        model.rpn._post_nms_top_n = {"training": 60, "testing": 60}
    if name.startswith("retinanet"):
        model.score_thresh = 0.0  # it begins with all scores near 0.01
    return model


@torch.no_grad()
def detections(model):
    torch.manual_seed(1)
    return model.eval()(pictures())


def assert_equal(a, b):
    for one, other in zip(a, b, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "scores", "labels"))


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("fasterrcnn:resnet18", 8),
        ("fasterrcnn_c4:resnet18", 8),
        ("retinanet:resnet18", 8),
        ("fasterrcnn:timm:test_resnet", 4),
        ("stairnet300:mobilenet_v1", 6),
    ],
)
def test_attention_at_the_identity_leaves_detections_bit_equal_and_learns(name, places):
    torch.manual_seed(0)
    plain = small(name)
    torch.manual_seed(0)
    model = small(f"{name}+cbam", start="identity")
    model.load_state_dict(plain.state_dict(), strict=False)
    before = detections(plain)
    assert sum(len(found["scores"]) for found in before)
    assert_equal(before, detections(model))
    losses = model.train()(pictures(), targets())
    assert all(loss.isfinite() for loss in losses.values())
    # Not by the losses: of so few images they sample no box on some of the maps.
    maps = model.backbone(torch.rand(2, 3, 300, 300) if "stairnet" in name else torch.rand(2, 3, 64, 64))
    maps = list(maps.values())
    if "c4" in name:
        maps.append(model.roi_heads.box_head(torch.rand(3, 256, 14, 14)))
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    parts = attached(model)
    assert len(parts) == places
    for part in parts.values():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    model.load_state_dict(plain.state_dict(), strict=False)  # training moved the statistics
    detach(model)
    assert_equal(before, detections(model))


@pytest.mark.parametrize("attention", [CBAM, ChannelAttention])
def test_attention_can_be_attached_to_a_finished_detector(attention):
    model = small("fasterrcnn:resnet18")
    before = detections(model)
    attach(model.backbone.body, attention=attention)
    assert len(attached(model)) == 8
    assert_equal(before, detections(model))


def test_c4_has_one_map_and_conv5_as_its_head():
    """Parameters by hand: ResNet50 without its classifier, proposals over 1024 channels and 15 anchors."""
    with torch.device("meta"):
        model = detector("fasterrcnn_c4:resnet50", num_classes=20)
        network = sum(p.numel() for p in build("resnet50").parameters()) - 2049 * 1000
    proposals = 1024 * 1024 * 9 + 1024 + 1025 * 15 * 5
    assert sum(p.numel() for p in model.parameters()) == network + proposals + 2049 * 21 * 5
    small_one = small("fasterrcnn_c4:resnet18")
    (only,) = small_one.backbone(torch.rand(1, 3, 64, 96)).values()
    assert only.shape == (1, 256, 4, 6)
    seen = []
    small_one.roi_heads.box_head.register_forward_hook(lambda _m, i, o: seen.append((i[0].shape, o.shape)))
    detections(small_one)
    ((given, made),) = seen
    assert given[1:] == (256, 14, 14)
    assert made == (given[0], 512)
    assert given[0] <= 2 * 60
    assert detector("fasterrcnn_c4:resnet18", num_classes=3).rpn.post_nms_top_n() == 2000


def test_freezing_a_norm_leaves_what_a_detector_finds_and_its_names():
    torch.manual_seed(0)
    model = small("fasterrcnn_c4:resnet18")
    model.train()(pictures(), targets())  # statistics that are not 0 and 1
    before, keys = detections(model), list(model.state_dict())
    free = sum(p.numel() for p in model.parameters())
    affine = sum(m.weight.numel() * 2 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert freeze_norm(model) is model
    after = detections(model)
    for one, other in zip(before, after, strict=True):
        for key in ("boxes", "scores"):
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-3)
        assert torch.equal(one["labels"], other["labels"])
    assert set(keys) - set(model.state_dict()) == {k for k in keys if k.endswith("num_batches_tracked")}
    assert sum(p.numel() for p in model.parameters()) == free - affine
    model.train()(pictures(), targets())
    assert_equal(after, detections(model))  # nothing moved


def test_a_frozen_network_is_torchvisions_own():
    from torchvision.models import resnet18
    from torchvision.ops import FrozenBatchNorm2d

    theirs = resnet18(norm_layer=FrozenBatchNorm2d).eval()
    plain = build("resnet18", num_classes=1000)
    loaded = load_weights(theirs, plain.state_dict())  # the counters are left out
    assert loaded.tensors == len(theirs.state_dict())
    ours = freeze_norm(plain).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))
    load_weights(build("resnet18", num_classes=1000), ours.state_dict())  # and back


@pytest.mark.parametrize("name", ["timm:regnetx_002", "timm:efficientnet_lite0"])
def test_norms_with_an_activation_in_them_keep_it(name):
    torch.manual_seed(0)
    network = build(name, num_classes=3)
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)  # as trained: timm begins some at 0
    x = torch.rand(4, 3, 64, 64)
    network.train()(x)  # statistics that are not 0 and 1
    with torch.no_grad():
        before = network.eval()(x)
        freeze_norm(network)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
        after = network(x)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        attach(network)
        assert torch.equal(network(x), after)
    network.train()(x).sum().backward()
    load_weights(build(name, num_classes=3), detach(network).state_dict())


def test_synchronised_norms_are_frozen_as_others():
    plain = build("resnet18", num_classes=3)
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    x = torch.rand(1, 3, 32, 32)
    frozen = [freeze_norm(network).train()(x) for network in (plain, synchronised)]
    assert torch.equal(*frozen)


def test_a_batchnorm_of_an_unknown_kind_is_not_replaced_by_half_of_it():
    class Doubling(torch.nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(InputError, match=r"Doubling cannot be frozen"):
        freeze_norm(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), Doubling(4)))


@pytest.mark.parametrize("order", ["attached first", "frozen first", "torchvision's"])
@pytest.mark.parametrize("how", ["reference", "fused"])
def test_identity_attention_with_frozen_norms_is_bit_equal_and_learns(order, how):
    """The end of a block is one operation with a BatchNorm alone, not with a frozen one."""
    from torchvision.models import resnet18
    from torchvision.ops import FrozenBatchNorm2d

    if how == "fused" and cpu.missing():
        pytest.skip("the CPU kernels are not installed")
    torch.manual_seed(0)
    net = resnet18(norm_layer=FrozenBatchNorm2d) if order == "torchvision's" else resnet18()
    if order == "attached first":
        expected = freeze_norm(copy.deepcopy(net)).eval()
        attach(net)
        freeze_norm(net)
    else:
        freeze_norm(net)
        expected = copy.deepcopy(net).eval()
        attach(net)
    x = torch.rand(2, 3, 64, 64)
    with ops.using(how):
        assert torch.equal(net.eval()(x), expected(x))
        net.train()(x).square().sum().backward()
    parts = attached(net)
    assert len(parts) == 8
    own = [m for part in parts.values() for m in part.modules()]
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in own)
    for part in parts.values():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
        assert part.spatial.bn.weight.grad is not None
    frozen = [m for m in net.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen) == 20
    detach(net)
    with ops.using(how):
        assert torch.equal(net.eval()(x), expected(x))


@pytest.mark.parametrize("make", [faster_rcnn, retinanet])
@pytest.mark.parametrize("name", ["resnet18+cbam", "timm:resnet18"])
def test_a_classifiers_checkpoint_goes_into_the_backbone(make, name, tmp_path):
    trained = build(name, num_classes=5)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    network = build(name, num_classes=5)
    load_weights(network, tmp_path / "weights.pt")
    body = make(network, 3).backbone.body
    body = body.network if isinstance(body, TimmMaps) else body
    kept, given = body.state_dict(), trained.state_dict()
    assert {key for key in given if key not in kept} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, given[key]) for key, value in kept.items())


@pytest.mark.parametrize("make", [faster_rcnn, faster_rcnn_c4, retinanet])
@pytest.mark.parametrize("name", ["resnet18+cbam", "resnet50", "wide_resnet18_1.1", "resnext50_32x4d"])
def test_a_network_with_a_classifier_of_its_users_own_is_a_backbone(make, name):
    with torch.device("meta"):
        network, other = build(name), build(name)
        expected = {key: value.shape for key, value in make(network, 3).state_dict().items()}
        other.fc = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(other.fc.in_features, 5))
        model = make(other, 3)
    assert {key: value.shape for key, value in model.state_dict().items()} == expected


def test_any_timm_network_with_maps_is_a_backbone():
    for name in ("timm:test_convnext", "timm:test_efficientnet"):
        model = small(f"fasterrcnn:{name}")
        losses = model.train()(pictures(), targets())
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:levit_128s"])
def test_a_network_of_one_size_of_images_is_refused_as_it_was(name):
    with torch.device("meta"):
        network = build(name, num_classes=3).train()
        keys = list(network.state_dict())
        with pytest.raises(
            ConfigError, match="accepts images of one size only, but a detector's images vary in size"
        ):
            retinanet(network, 3)
    assert list(network.state_dict()) == keys
    assert network.training


def test_a_network_that_timm_trained_at_one_size_and_takes_others_is_a_backbone():
    with torch.device("meta"):
        network = build("timm:twins_svt_small", num_classes=3)
        assert network.pretrained_cfg["fixed_input_size"]
        maps = faster_rcnn(network, 3).backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


def test_the_maps_of_a_pyramid_halve_from_a_quarter_of_the_image():
    body = faster_rcnn(build("resnet18"), 3).backbone
    shapes = [tuple(m.shape[1:]) for m in body(torch.rand(1, 3, 64, 64)).values()]
    assert shapes == [(256, 16, 16), (256, 8, 8), (256, 4, 4), (256, 2, 2), (256, 1, 1)]
    body = retinanet(build("resnet18"), 3).backbone
    assert [m.shape[-1] for m in body(torch.rand(1, 3, 128, 128)).values()] == [16, 8, 4, 2, 1]


def test_faster_rcnn_is_torchvisions():
    from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

    with torch.device("meta"):
        for make, ours in ((fasterrcnn_resnet50_fpn, "fasterrcnn"), (retinanet_resnet50_fpn, "retinanet")):
            theirs = make(weights=None, weights_backbone=None, num_classes=21)
            shapes = {key: value.shape for key, value in theirs.state_dict().items()}
            model = detector(f"{ours}:resnet50", num_classes=20)
            assert {key: value.shape for key, value in model.state_dict().items()} == shapes


def test_stairnets_attention_is_right_before_every_classifier():
    model = small("stairnet300:mobilenet_v1+cbam")
    assert list(attached(model)) == [f"backbone.smooth.{i}" for i in range(6)]
    seen = {}
    for i, part in enumerate(attached(model).values()):
        part.register_forward_hook(lambda _m, _i, out, i=i: seen.setdefault(f"out{i}", out))
    head = model.head.classification_head.module_list
    for i, classifier in enumerate(head):
        classifier.register_forward_pre_hook(lambda _m, given, i=i: seen.setdefault(f"in{i}", given[0]))
    detections(model)
    assert all(torch.equal(seen[f"out{i}"], seen[f"in{i}"]) for i in range(6))


@pytest.mark.parametrize("backbone", ["vgg16", "mobilenet_v1"])
def test_the_stairs_maps_have_the_sides_and_the_width_they_state(backbone):
    from cbam.models.ssd import Stairs, _maps

    maps = _maps(backbone)
    with torch.device("meta"):
        stairs = Stairs(maps).to("meta")
    shapes = [tuple(m.shape) for m in stairs(torch.zeros(1, 3, 300, 300, device="meta")).values()]
    assert shapes == [(1, maps.width, side, side) for side in maps.sides]


def test_what_the_last_map_knows_reaches_the_first():
    stairs = small("stairnet300:mobilenet_v1").backbone
    picture = torch.rand(1, 3, 300, 300)
    (before,) = (m for name, m in stairs(picture).items() if name == "0")
    with torch.no_grad():
        stairs.lateral[5].bias += 1
    assert not torch.equal(stairs(picture)["0"], before)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fasterrcnn", "expected DETECTOR:NETWORK"),
        ("yolo:resnet18", f"one of {', '.join(DETECTORS)}"),
        ("ssd300:resnet18", "ssd300 is built on vgg16 or mobilenet_v1, got 'resnet18'"),
        ("stairnet300:vgg16+no", "unknown attention 'no'"),
        ("ssd300:vgg16+cbam", "ssd300 has no place for attention"),
        ("fasterrcnn:mobilenet_v1", "MobileNetV1 returns no feature maps"),
        ("fasterrcnn_c4:timm:resnet18", "fasterrcnn_c4 needs a torchvision ResNet, got ResNet"),
        ("fasterrcnn:resnet18+no", "unknown attention 'no'"),
    ],
)
def test_a_detector_that_cannot_be_built_is_refused(name, told):
    with torch.device("meta"), pytest.raises(ConfigError, match=told):
        detector(name, num_classes=3)


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_the_number_of_classes_is_checked(count):
    with pytest.raises(InputError, match="num_classes must be a positive int"):
        detector("ssd300:vgg16", num_classes=count)


def test_a_detector_is_named_by_a_string():
    with pytest.raises(InputError, match="name of a detector must be a str, got int"):
        detector(5, num_classes=3)
