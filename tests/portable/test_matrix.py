"""Networks of every family in every format, at sizes that were not seen at the export, in a fresh process."""

import importlib.util

import pytest
import torch

import cbam
from cbam.portable.formats import FORMATS
from cbam.portable.program import program, settled, unseen_shapes

NETWORKS = """
resnet_tiny+cbam mobilenet_v1_0.7+cbam resnet18+cbam resnet34+cbam resnet50+cbam resnext50_32x4d+cbam
wide_resnet50_2+cbam mobilenet_v2+cbam mobilenet_v3_small+cbam mnasnet0_5+cbam efficientnet_b0+cbam
regnet_y_400mf+cbam convnext_tiny+cbam timm:resnet26+cbam timm:resnet50d+cbam timm:seresnet18+cbam
timm:regnetx_002+cbam timm:convnextv2_atto+cbam timm:efficientnet_lite0+cbam timm:ghostnet_100+cbam
timm:dla34+cbam timm:mobilenetv3_small_050+cbam timm:resnetv2_50+cbam timm:poolformer_s12+cbam
resnet18+se resnet18+bam resnet18+eca resnet18+coordatt resnet18+simam resnet18+triplet
""".split()
TRACED = (1, 3, 64, 64)
SHAPES = ((1, 3, 96, 64), (3, 3, 64, 160), (2, 3, 128, 96))


# E1, E2, E3
@pytest.mark.large
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same_in_every_format(name, tmp_path, in_a_fresh_process):
    model = cbam.build(name, num_classes=10)
    for key, parameter in model.named_parameters():
        if "cbam" in key and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)  # gates that are neither open nor shut
    there = {n: made for n, made in FORMATS.items() if all(map(importlib.util.find_spec, made.needs))}
    with settled(model):
        graph = program(model, TRACED, dynamic=True)
        pairs = [(x, model(x)) for x in (torch.randn(shape) for shape in SHAPES)]
        for made in there.values():
            made.write(graph, tmp_path / f"a{made.suffixes[-1]}", {}, None)
    assert not {*SHAPES} & {*unseen_shapes(TRACED, dynamic=True)}
    torch.save(pairs, tmp_path / "pairs.pt")
    found = in_a_fresh_process(tmp_path, [f"a{made.suffixes[-1]}" for made in there.values()])
    assert len(found) == len(there)
    for file, compared in found.items():
        print(name, file, *(f"{difference:.1e}" for difference, _ in compared))
        assert len(compared) == len(SHAPES)
        for difference, same in compared:
            assert difference <= 1e-5, file
            assert same, file
    if len(there) < len(FORMATS):
        pytest.skip(f"checked {', '.join(there)}; the others need packages of cbam[export]")
