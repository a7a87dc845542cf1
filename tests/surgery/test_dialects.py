"""Weights of other CBAM implementations: loaded if the function is the same, refused if not."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import cbam
from cbam.errors import CheckpointError

ROOT = Path(__file__).parents[2]
PROGRAM = runpy.run_path(str(ROOT / "docs" / "fill_dialects.py"))
DIALECTS, drawn, image = PROGRAM["DIALECTS"], PROGRAM["drawn"], PROGRAM["image"]
SAME = ["released code", "timm", "timm, `mlp_bias=True`", "mmyolo", "luuuyi"]
OTHER = {
    "External-Attention": r"External-Attention, which adds its input to its output, x \+ CBAM\(x\)",
    "Peachypie98": r"Peachypie98, which adds its input to its output",
    "ultralytics": "ultralytics, which computes its channel gate with one layer from C to C on the mean only",
}
WITHOUT_NORM = {"mmyolo", "luuuyi"}


def gap(ours, theirs, x):
    with torch.no_grad():
        return (ours(x) - theirs(x)).abs().max().item()


class Block(nn.Module):
    """A residual block with another implementation's attention, or with none."""

    def __init__(self, channels, attention=None, name="attn"):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.norm = nn.BatchNorm2d(channels)
        self.refine = attention
        if attention is not None and name:
            self.add_module(name, attention)
        elif attention is not None:
            for child, module in attention.named_children():
                self.add_module(child, module)
        self._modules.pop("refine", None)  # only under the name asked for
        self.__dict__["refine"] = attention

    def forward(self, x):
        branch = self.norm(self.relu(self.conv(x)))
        return x + (branch if self.refine is None else self.refine(branch))


def network(attention=None, name="attn"):
    block = Block(64, attention, name)
    return nn.Sequential(nn.Conv2d(3, 64, 1), block, nn.Conv2d(64, 5, 1))


def test_the_dialects_page_is_up_to_date():
    page = (ROOT / "docs" / "dialects.md").read_text("utf-8")
    assert PROGRAM["filled"](page) == page, "run make cards"


@pytest.mark.parametrize("biases", [False, True])
def test_the_restated_timm_equals_timm(biases):
    """K10"""
    timm_cbam = pytest.importorskip("timm.layers.cbam")
    restated = drawn(DIALECTS["timm, `mlp_bias=True`" if biases else "timm"](256))
    timms = timm_cbam.CbamModule(256, mlp_bias=biases).double().eval()
    timms.load_state_dict(restated.state_dict())
    assert gap(timms, restated, image()) < 1e-14


@pytest.mark.parametrize("start", ["paper", "identity"])
@pytest.mark.parametrize("name", SAME)
def test_weights_of_an_equivalent_module_load(name, start):
    """K10"""
    theirs, ours = drawn(DIALECTS[name](256)), cbam.CBAM(256).double().eval()
    if start == "identity":
        ours.identity_()
    loaded = cbam.load_weights(ours, theirs.state_dict())
    assert gap(ours, theirs, image()) < 1e-14
    assert loaded.format == name.partition(" ")[0].rstrip(",")
    assert loaded.missing == ()
    assert loaded.eval_only == (name in WITHOUT_NORM)


@pytest.mark.parametrize("name", SAME)
def test_training_differs_only_if_eval_only_is_set(name):
    """Without a norm in their gate, training computes something else."""
    theirs, ours = drawn(DIALECTS[name](256)), cbam.CBAM(256).double()
    loaded = cbam.load_weights(ours, theirs.state_dict())
    assert (gap(ours.train(), theirs.train(), image()) > 0.1) == loaded.eval_only


@pytest.mark.parametrize(("name", "child"), [(n, c) for n in SAME for c in ("attn", "")])
def test_attention_weights_of_a_network_load(name, child):
    """K10: under a child of any name, or as children of the block."""
    torch.manual_seed(0)
    theirs = drawn(network(DIALECTS[name](64), child))
    ours = cbam.attach(network().double().eval())
    loaded = cbam.load_weights(ours, theirs.state_dict())
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    assert gap(ours, theirs, x) < 1e-12
    assert loaded.missing == ()


@pytest.mark.parametrize("name", SAME)
def test_weights_load_into_a_cbam_that_was_not_attached(name):
    torch.manual_seed(0)
    theirs = drawn(nn.Sequential(nn.Conv2d(3, 64, 1), DIALECTS[name](64)))
    ours = nn.Sequential(nn.Conv2d(3, 64, 1), cbam.CBAM(64)).double().eval()
    cbam.load_weights(ours, theirs.state_dict())
    assert gap(ours, theirs, torch.randn(2, 3, 9, 11, dtype=torch.float64)) < 1e-12


def test_weights_of_luuuyis_older_version_load():
    new = drawn(DIALECTS["luuuyi"](256))
    old = {
        k.replace("fc.0", "fc1").replace("fc.2", "fc2"): v for k, v in new.state_dict().items()
    }  # the layers were attributes of their own before they were one Sequential
    ours = cbam.CBAM(256).double().eval()
    assert cbam.load_weights(ours, old).format == "luuuyi"
    assert gap(ours, new, image()) < 1e-14


def test_a_missing_norm_is_filled_in_for_the_models_eps():
    """K10"""
    theirs, ours = drawn(DIALECTS["mmyolo"](256)), cbam.CBAM(256).double().eval()
    ours.spatial.bn.eps = 1e-3
    cbam.load_weights(ours, theirs.state_dict())
    assert gap(ours, theirs, image()) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_filled_in_norm_changes_nothing_in_any_dtype(dtype):
    theirs, ours = drawn(DIALECTS["mmyolo"](256)).to(dtype), cbam.CBAM(256).to(dtype).eval()
    cbam.load_weights(ours, theirs.state_dict())
    x = image().to(dtype)
    logits = torch.randn(2, 1, 5, 5, dtype=dtype)
    bias = theirs.spatial_attention.conv.conv.bias
    torch.testing.assert_close(
        ours.spatial.bn(logits), logits + bias, rtol=4 * torch.finfo(dtype).eps, atol=0.01
    )
    assert gap(ours, theirs, x) < 16 * torch.finfo(dtype).eps * x.abs().max()


@pytest.mark.parametrize("name", OTHER)
def test_a_module_with_another_formula_is_refused_with_the_reason(name):
    theirs = DIALECTS[name](64)
    for source, model in (
        (theirs, cbam.CBAM(64)),
        (network(theirs), cbam.attach(network())),
        (network(theirs, ""), cbam.attach(network())),
        (network(theirs), network()),
    ):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"its attention is that of {OTHER[name]}.*unchanged"):
            cbam.load_weights(model, source.state_dict())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", SAME)
def test_loading_without_attention_says_to_attach(name):
    with pytest.raises(CheckpointError, match=r"call cbam.attach\(model\) first"):
        cbam.load_weights(network(), network(DIALECTS[name](64)).state_dict())


def test_another_reduction_is_refused_by_shape():
    """K12: luuuyi's argument `ratio` does nothing; its hidden layer is C // 16."""
    theirs = DIALECTS["luuuyi"](256, reduction=8)
    with pytest.raises(CheckpointError, match=r"channel.fc1.weight is \(16, 256\), the model's \(32, 256\)"):
        cbam.load_weights(cbam.CBAM(256, reduction=8), theirs.state_dict())


def test_a_foreign_network_loads_its_own_weights():
    theirs = network(DIALECTS["External-Attention"](64))
    assert cbam.load_weights(theirs, theirs.state_dict()).format == "plain"
