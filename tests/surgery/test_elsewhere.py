"""Networks of other projects, if installed: attach keeps their output, and every block is found.

None of them is a dependency; `pip install segmentation-models-pytorch monai ultralytics diffusers` runs all.
"""

import pytest
import torch

import cbam
from cbam.surgery import attached

PLANAR, VOLUME, CLIP = (1, 3, 64, 64), (1, 1, 16, 16, 16), (1, 3, 4, 32, 32)
NETWORKS = {
    "torchvision r3d_18": ("torchvision", lambda tv: tv.models.video.r3d_18(), CLIP, 8),
    "torchvision r2plus1d_18": ("torchvision", lambda tv: tv.models.video.r2plus1d_18(), CLIP, 8),
    "segmentation_models_pytorch Unet, ResNet18": (
        "segmentation_models_pytorch",
        lambda smp: smp.Unet("resnet18", encoder_weights=None),
        PLANAR,
        8,
    ),
    "MONAI UNet": (
        "monai.networks.nets",
        lambda nets: nets.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2),
        VOLUME,
        4,
    ),
    "MONAI SegResNet": ("monai.networks.nets", lambda nets: nets.SegResNet(3, init_filters=8), VOLUME, 12),
    "MONAI resnet18": (
        "monai.networks.nets",
        lambda nets: nets.resnet18(spatial_dims=3, n_input_channels=1),
        VOLUME,
        8,
    ),
    "ultralytics yolov8n": (
        "ultralytics.nn.tasks",
        lambda yolo: yolo.DetectionModel("yolov8n.yaml"),
        PLANAR,
        6,
    ),
    "ultralytics yolo11n": (
        "ultralytics.nn.tasks",
        lambda yolo: yolo.DetectionModel("yolo11n.yaml"),
        PLANAR,
        12,
    ),
    "diffusers AutoencoderKL": (
        "diffusers",
        lambda d: d.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        PLANAR,
        10,
    ),
}


def first(out):
    return out if isinstance(out, torch.Tensor) else first(out[0])


@pytest.mark.large
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_attaching_keeps_the_output_and_finds_every_block(name):
    module, make, shape, places = NETWORKS[name]
    model = make(pytest.importorskip(module)).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        before = first(model(x))
        cbam.attach(model)
        assert torch.equal(first(model(x)), before)
    parts = attached(model).values()
    assert len(parts) == places
    assert all(part.spatial.dim == len(shape) - 2 for part in parts)
