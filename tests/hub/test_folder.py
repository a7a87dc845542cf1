"""Trained networks as folders: bit for bit there and back, and nothing of a strange folder is run."""

import copy
import errno
import hashlib
import json
import pickle
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, errors
from torch import nn

import cbam
from cbam.app import cli
from cbam.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    DtypeError,
    InputError,
    OutputError,
)
from cbam.hub import Card, card_of

ROOT = Path(__file__).parents[2]
NETWORK = "resnet_tiny+cbam"


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def change(folder: Path, **fields) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_round_trip_is_bit_for_bit_in_every_dtype(dtype, model, tmp_path):
    folder = cbam.save_pretrained(model.to(dtype), tmp_path / "mine", network=NETWORK)
    found = cbam.from_pretrained(folder)
    assert equal(found, model)
    assert not found.training
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    assert torch.equal(found(x), model.eval()(x))


def test_the_card_comes_back_and_the_hub_reads_its_header(folder):
    card = card_of(folder)
    assert card.classes == tuple("abcde")
    assert (card.size, card.licence, card.recipe) == (32, "mit", {"epochs": 3, "rate": 0.05})
    read = ModelCard.load(folder / "README.md")
    assert (read.data.license, read.data.library_name) == ("mit", "cbam")
    (result,) = read.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("cluttered digits", 3.25)
    cost = cbam.models.profile(cbam.build(NETWORK, num_classes=5), 32)
    for told in (
        f"{cost.parameters:,}",
        f"{cost.gmac:.4f} G",
        "epochs 3",
        "| top-1 error, % | 3.25 |",
        "mit",
    ):
        assert told in read.content


def test_missing_fields_of_a_card_are_stated_as_missing(model, tmp_path):
    folder = cbam.save_pretrained(model, tmp_path / "mine", network=NETWORK)
    page = (folder / "README.md").read_text()
    assert page.count("not given") == 2
    assert "Not given: ask the author" in page
    assert "license" not in page


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet_tiny+se", "resnet_tiny+cbam", "resnet_tiny+cbam-k3"])
def test_the_card_cites_cbam_where_the_network_has_it(tmp_path, name):
    folder = cbam.save_pretrained(cbam.build(name, num_classes=3), tmp_path / "net", network=name)
    assert ("arXiv 1807.06521" in (folder / "README.md").read_text()) == ("+cbam" in name)


def test_a_card_cannot_break_out_of_its_header_or_its_table(model, tmp_path):
    evil = Card(data="x\n---\n<script>", licence='mit"\ntags: [a]', results={"a | b": 1.0}, recipe="a\n# b")
    page = (cbam.save_pretrained(model, tmp_path / "mine", card=evil) / "README.md").read_text()
    assert page.count("\n---\n") == 1
    assert "<script>" not in page.split("\n---\n")[1]
    assert "\n# b" not in page
    assert ModelCard(page).data.license == 'mit"\ntags: [a]'


def test_names_that_are_not_utf8_are_escaped(model, tmp_path):
    undecodable = b"caf\xe9".decode("utf-8", "surrogateescape")
    told = Card(data=undecodable, classes=(undecodable, *"bcde"))
    folder = cbam.save_pretrained(model, tmp_path / undecodable, card=told)
    assert (folder / "README.md").read_text(encoding="utf-8").count(r"caf\udce9") > 2
    assert card_of(folder) == told


def test_saving_leaves_the_random_state_unchanged(model, tmp_path):
    before = torch.get_rng_state()
    cbam.save_pretrained(model, tmp_path / "mine", network=NETWORK)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_custom_network_is_passed_in_on_loading(model, tmp_path):
    own = torch.nn.Sequential(model, torch.nn.Flatten(), torch.nn.Linear(5, 2))
    folder = cbam.save_pretrained(own, tmp_path / "mine")
    with pytest.raises(ConfigError, match="give model="):
        cbam.from_pretrained(folder)
    other = cbam.attach(cbam.build("resnet_tiny", num_classes=5))
    found = cbam.from_pretrained(
        folder, model=torch.nn.Sequential(other, torch.nn.Flatten(), torch.nn.Linear(5, 2))
    )
    assert equal(found, own)


def test_a_wrapped_network_is_saved_without_its_wrapper(model, tmp_path):
    folder = cbam.save_pretrained(torch.nn.DataParallel(model), tmp_path / "mine", network=NETWORK)
    assert equal(cbam.from_pretrained(folder), model)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"network": "resnet_tiny"}, ConfigError, "builds a network with other tensors"),
        ({"network": "resnt"}, ConfigError, "unknown network"),
        ({"card": Card(classes=("a",))}, InputError, "names 1 classes, but the network has 5"),
        ({"card": Card(recipe={"a": {1, 2}})}, InputError, "cannot be written as JSON"),
        ({"card": {"size": 32}}, InputError, r"card must be a cbam\.hub\.Card, got dict"),
    ],
)
def test_a_network_that_could_not_be_read_back_is_not_written(options, error, told, model, tmp_path):
    with pytest.raises(error, match=told):
        cbam.save_pretrained(model, tmp_path / "mine", **options)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_name_that_builds_another_function_of_the_same_tensors_is_refused(tmp_path):
    strided = cbam.build("resnet50", num_classes=2, stride_in="1x1")
    with pytest.raises(ConfigError, match="computes something else from the same weights"):
        cbam.save_pretrained(strided, tmp_path / "mine", network="resnet50", card=Card(size=64))
    with pytest.raises(InputError, match="does not take images of 1 px"):
        cbam.save_pretrained(
            cbam.build("googlenet", num_classes=2), tmp_path / "mine", network="googlenet", card=Card(size=1)
        )


@pytest.mark.parametrize(
    "field",
    [
        {"size": 0},
        {"mean": ()},
        {"mean": (0.5,)},
        {"std": (0.0,)},
        {"results": {"a": float("nan")}},
        {"classes": "ab"},
        {"resize": 223},
    ],
)
def test_a_card_refuses_invalid_values(field):
    with pytest.raises(InputError, match=f"Card\\({next(iter(field))}"):
        Card(**field)


def test_a_non_tensor_state_is_refused(tmp_path):
    class Counting(nn.Sequential):
        def get_extra_state(self):
            return {"seen": 3}

    with pytest.raises(InputError, match=r"_extra_state of the state dict is a dict"):
        cbam.save_pretrained(Counting(nn.Conv2d(3, 2, 1)), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_several_dtypes_are_refused(model, tmp_path):
    model.fc.half()
    with pytest.raises(DtypeError, match="float16"):
        cbam.save_pretrained(model, tmp_path / "mine")


# C7
def test_existing_files_stay_unless_overwriting_is_requested(model, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="exists"):
        cbam.save_pretrained(model, folder, network=NETWORK)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    torch.nn.init.zeros_(model.fc.bias)
    cbam.save_pretrained(model, folder, network=NETWORK, overwrite=True)
    assert equal(cbam.from_pretrained(folder), model)


# K13, K16
def test_an_unwritable_path_is_one_error(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be created"):
        cbam.save_pretrained(model, tmp_path / "file" / "mine", network=NETWORK)


# K6
def test_every_flipped_bit_is_detected(folder):
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    for place in range(0, len(data), len(data) // 15):
        changed = data.copy()
        changed[place] ^= 1 << place % 8
        weights.write_bytes(changed)
        with pytest.raises(CheckpointError):
            cbam.from_pretrained(folder)


# K1
@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_detected(share, folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (not safetensors|damaged)|do not fit"):
        cbam.from_pretrained(folder)


class _Payload:
    def __reduce__(self):
        return print, ("a payload ran",)


# K3
@pytest.mark.parametrize("how", ["pickle", "torch.save", "torch.save, old format"])
def test_a_pickle_in_place_of_safetensors_is_not_read(how, folder, capsys):
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    if how == "pickle":
        weights.write_bytes(pickle.dumps(_Payload()) + bytes(size))
    else:
        torch.save({"a": _Payload()}, weights, _use_new_zipfile_serialization=how == "torch.save")
        weights.write_bytes(weights.read_bytes() + bytes(size))
    with pytest.raises(CheckpointError, match="not safetensors"):
        cbam.from_pretrained(folder)
    assert "ran" not in capsys.readouterr().out


# K3
def test_a_folder_with_only_pickles_is_not_read(folder):
    torch.save({"a": _Payload()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"no model\.safetensors; .*pickles can run code"):
        cbam.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json, model\.safetensors; "):
        cbam.from_pretrained(folder)


# K4
def test_a_folder_of_torchs_distributed_checkpoints_is_not_unpickled(folder, model, tmp_path, capsys):
    for place in (folder, tmp_path / "other"):
        place.mkdir(exist_ok=True)
        (place / ".metadata").write_bytes(pickle.dumps(_Payload()))
        (place / "__0_0.distcp").write_bytes(pickle.dumps(_Payload()))
    assert equal(cbam.from_pretrained(folder), model)
    other = str(tmp_path / "other")
    for read in (cbam.from_pretrained, lambda path: cbam.load_weights(model, path)):
        with pytest.raises(CheckpointError):
            read(other)
    for command in (["eval", other], ["export", other, "--to", "torch"], ["look", "--weights", other, other]):
        assert cli.main(command) in (2, 3, 4)
    for name in (".metadata", "__0_0.distcp"):
        with pytest.raises(CheckpointError):
            cbam.load_weights(model, tmp_path / "other" / name)
    told = capsys.readouterr()
    assert "ran" not in told.out + told.err


# K5
@pytest.mark.parametrize(
    "fields",
    [
        {"outputs": 10**12},
        {"outputs": 300_000},
        {"outputs": -1},
        {"outputs": True},
        {"name": "mobilenet_v1_9999"},
        {"name": "wide_resnet18_500+cbam"},
        {"name": "os:system"},
        {"name": "../../etc"},
        {"name": ["resnet18"]},
        {"dtype": "object"},
        {"dtype": "float16.__class__"},
        {"sha256": None},
        {"format": 4},
        {"format": "1"},
        {"library_name": "timm"},
        {"card": None},
        {"card": {"size": "__import__"}},
        {"card": {"run": "me"}},
        {"card": {"classes": ["a"]}},
        {"gmac": "a"},
        {"gmac": 10**400},
        {"card": {"std": [10**400, 1, 1]}},
    ],
)
def test_an_invalid_configuration_is_refused_before_allocation(fields, folder, monkeypatch):
    change(folder, **fields)
    monkeypatch.setattr("cbam.hub.folder.load_weights", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(CheckpointError):
        cbam.from_pretrained(folder)


# K5
def test_a_network_whose_attention_is_larger_than_its_weights_is_not_built(folder, monkeypatch):
    weights = folder / "model.safetensors"
    header = weights.read_bytes()[:9]
    with weights.open("r+b") as file:
        file.write(header)
        file.truncate(26_000_000)  # room for the parameters of ResNet-50, not for GAM's of 256 MB and more
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    change(folder, name="resnet50+gam", outputs=1000, card={}, sha256=digest)
    monkeypatch.setattr("cbam.hub.folder.load_weights", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(CheckpointError, match="parameters do not fit into 26000000 bytes"):
        cbam.from_pretrained(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"a": NaN', "[" * 100_000, "\x00", '"' + "a" * 5_000_000 + '"']
)
def test_an_invalid_configuration_is_one_error(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        cbam.from_pretrained(folder)


# K5
def test_a_safetensors_header_that_claims_gigabytes_is_refused(folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(struct.pack("<Q", 2**40) + data[8:])
    with pytest.raises(CheckpointError, match="damaged"):
        cbam.from_pretrained(folder)


def test_weights_without_the_attention_that_the_configuration_names_are_refused(model, folder, tmp_path):
    plain = cbam.save_pretrained(cbam.detach(model), tmp_path / "plain", network="resnet_tiny")
    change(plain, name=NETWORK)
    with pytest.raises(CheckpointError, match="lacks the attention"):
        cbam.from_pretrained(plain)


@pytest.mark.parametrize("lacking", [False, True], ids=["of another shape", "without its attention"])
def test_a_custom_network_is_unchanged_if_a_folder_does_not_fit(lacking, model, tmp_path):
    source = cbam.detach(model) if lacking else cbam.attach(cbam.build("resnet_tiny", num_classes=7))
    folder = cbam.save_pretrained(source.half(), tmp_path / "mine")
    given = cbam.attach(cbam.build("resnet_tiny", num_classes=5)).train()
    before = copy.deepcopy(given.state_dict())
    with pytest.raises(CheckpointError):
        cbam.from_pretrained(folder, model=given)
    after = given.state_dict()
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in after.items())
    assert given.training


# --- the Hub, which no test reaches ---


def test_a_repository_is_read_from_the_downloaded_snapshot(folder, model, monkeypatch):
    asked = []

    def bring(repository, *, allow_patterns, revision):
        asked.append((repository, sorted(allow_patterns), revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", bring)
    assert equal(cbam.from_pretrained("somebody/net", revision="v1"), model)
    assert asked == [("somebody/net", ["config.json", "model.safetensors"], "v1")]


def _answer(kind):
    """An error of huggingface_hub without the answer of a server that it is usually made from."""
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    return error


# K23
@pytest.mark.parametrize(
    ("failure", "error", "told"),
    [
        (lambda: _answer(errors.RepositoryNotFoundError), CheckpointNotFoundError, "no such repository"),
        (lambda: _answer(errors.RevisionNotFoundError), CheckpointNotFoundError, "no revision 'v9'"),
        (lambda: _answer(errors.GatedRepoError), CheckpointError, "hf auth login"),
        (lambda: errors.LocalEntryNotFoundError("offline"), CheckpointError, "cannot be reached"),
        (lambda: ConnectionError("no route"), CheckpointError, r"cannot be reached \(no route\)"),
        (lambda: TimeoutError(), CheckpointError, r"cannot be reached \(TimeoutError\)"),
    ],
)
def test_a_hub_failure_is_one_clear_error(failure, error, told, monkeypatch):
    def fail(*_, **__):
        raise failure()

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(error, match=told):
        cbam.from_pretrained("somebody/net", revision="v9")


# K19
@pytest.mark.parametrize(
    "name", ["nowhere", "./some/net", "a/b/c", "~/net", "a/../b", "https://a.b/c", "", "x" * 300, "a\0b"]
)
def test_a_missing_folder_is_not_requested_from_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises((CheckpointNotFoundError, CheckpointError)):
        cbam.from_pretrained(name)


def test_a_file_and_a_revision_of_a_folder_are_refused(folder):
    with pytest.raises(CheckpointError, match="takes a folder"):
        cbam.from_pretrained(folder / "model.safetensors")
    with pytest.raises(ConfigError, match="no revisions"):
        cbam.from_pretrained(folder, revision="main")


# --- torch.hub and timm ---


def test_torch_hub_finds_the_networks_of_this_repository(folder, model):
    names = runpy.run_path(str(ROOT / "hubconf.py"))["__all__"]
    assert {"resnet18_cbam", "resnet50_cbam", "mobilenet_v2_cbam", "from_pretrained", "build"} <= set(names)
    made = torch.hub.load(str(ROOT), "resnet18_cbam", source="local", num_classes=3)
    assert len(cbam.surgery.attached(made)) == 8
    assert made.fc.out_features == 3
    assert equal(torch.hub.load(str(ROOT), "from_pretrained", str(folder), source="local"), model)


@pytest.mark.parametrize(
    "order",
    [
        pytest.param("import timm, cbam", marks=pytest.mark.large),
        "import cbam\nimportlib.util.find_spec('timm')\nimport timm",
        pytest.param("import cbam, timm", marks=pytest.mark.large),
        pytest.param("import cbam; cbam.models; import timm.layers", marks=pytest.mark.large),
    ],
)
def test_timm_knows_the_names_in_any_import_order(order):
    program = f"""
import importlib.util, sys
{order}
import timm
model = timm.create_model("cbam_resnet18", num_classes=7, in_chans=1)
import cbam
print(len(cbam.surgery.attached(model)), model.fc.out_features, model.conv1.in_channels)
print(type(timm.__spec__.loader).__name__, "exec_module" in vars(timm.__spec__.loader))
print(any(name.startswith("cbam_") for name in cbam.models.names()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["8 7 1", "SourceFileLoader False", "False"]


@pytest.mark.large
@pytest.mark.parametrize("network", cbam.timm_names.NETWORKS)
def test_every_name_that_timm_learns_makes_a_network_with_attention(network):
    import timm

    model = timm.create_model(f"cbam_{network}", num_classes=3)
    assert cbam.surgery.attached(model)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_attention_over_the_pretrained_weights_of_timm_changes_nothing(monkeypatch):
    import timm

    from cbam import timm_names

    plain = timm.create_model("resnet18", num_classes=4).eval()
    real = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained, **_: plain if pretrained else real(name)
    )
    x = torch.randn(1, 3, 64, 64)
    before = plain(x)
    made = timm_names._entry("resnet18")(pretrained=True, num_classes=4)
    assert len(cbam.surgery.attached(made)) == 8
    assert torch.equal(made(x), before)


def test_a_failed_timm_registration_is_logged_and_not_raised(monkeypatch, caplog):
    from cbam import timm_names

    monkeypatch.setattr(timm_names, "_entry", lambda name: 1 / 0)
    monkeypatch.setattr("timm.models.is_model", lambda name: not name.startswith("cbam_"))
    timm_names.register_safely()
    assert "timm.create_model does not know cbam_*" in caplog.text


def test_a_copied_folder_loads_the_same(folder, model, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert equal(cbam.from_pretrained(str(tmp_path / "elsewhere")), model)


def test_a_failed_save_removes_the_folder_it_created(tmp_path, monkeypatch):
    # K13
    model = cbam.build("resnet_tiny", num_classes=2)
    (tmp_path / "there").mkdir()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        for name in ("new/deep", "there"):
            with pytest.raises(OutputError, match="No space left"):
                cbam.save_pretrained(model, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    cbam.save_pretrained(model, tmp_path / "new" / "deep")
