"""Files for other runtimes: what is written, what is refused, and that a refusal leaves nothing behind."""

import copy
import importlib.util
import json
import logging
import resource
import signal
import warnings

import pytest
import torch
from torch import nn

import cbam
from cbam.errors import (
    ConfigError,
    DtypeError,
    ExportError,
    InputError,
    MissingExtraError,
    NonFiniteError,
    OutputError,
)
from cbam.ops.dispatch import tail
from cbam.portable import check, export, formats
from cbam.portable.program import inputs, program, quiet, settled, traced_shape, unseen_shapes

SMALL = (1, 3, 32, 32)
NEEDS = {"a.pt2": (), "a.onnx": ("onnxscript", "onnxruntime"), "a.xml": ("onnxscript", "openvino")}


def need(file: str) -> None:
    for name in NEEDS[file]:
        pytest.importorskip(name, reason=f"{name} of cbam[export] is not installed")


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ABOUT = {"classes": ["a", "b"], "note": "c"}
UNSEEN = ((1, 3, 40, 72), (4, 3, 96, 33), (7, 3, 64, 64))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, in_a_fresh_process):
    """The folder; file -> (difference, same classes) at each size of UNSEEN, found where cbam is not."""
    folder = tmp_path_factory.mktemp("elsewhere")
    torch.manual_seed(1)
    model = cbam.build("resnet_tiny+cbam", num_classes=10)
    for name, parameter in model.named_parameters():
        if "cbam" in name:
            nn.init.normal_(parameter, std=0.3)
    with cbam.ops.using("reference"), torch.no_grad():
        inputs = [torch.randn(shape) for shape in UNSEEN]
        torch.save([(x, copy.deepcopy(model).eval()(x)) for x in inputs], folder / "pairs.pt")
    there = [file for file, names in NEEDS.items() if all(map(importlib.util.find_spec, names))]
    for file in there:
        made = export(model, folder / file, shape=SMALL, dynamic=True, about=ABOUT)
        assert made.agreement.difference <= 1e-5
        assert not {*made.agreement.shapes} & {*UNSEEN}
        written = [made.path.with_suffix(suffix) for suffix in formats.FORMATS[made.format].suffixes]
        assert made.size == sum(path.stat().st_size for path in written)
        assert len({*made.agreement.shapes}) == 3
    return folder, in_a_fresh_process(folder, there)


# E1, E2, E3
@pytest.mark.parametrize("file", NEEDS)
def test_a_file_computes_the_same_in_a_fresh_process_that_has_no_cbam(file, elsewhere):
    need(file)
    _, found = elsewhere
    assert len(found[file]) == len(UNSEEN)
    for difference, same in found[file]:
        assert difference <= 1e-5
        assert same


class Fused(nn.Module):
    """A network that calls our operator whatever the choice is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return tail(self.conv(x), relu=True).mean((2, 3))


# E1
def test_an_operator_of_ours_in_the_graph_is_refused(tmp_path, kernels):
    with pytest.raises(ExportError, match="operators that only this package has: cbam"):
        export(Fused(), tmp_path / "a.pt2", shape=SMALL)
    assert files(tmp_path) == {}


# E1
def test_an_operator_of_ours_in_a_branch_of_the_graph_is_refused(tmp_path, kernels):
    class Branches(Fused):
        def forward(self, x):
            features = self.conv(x)
            return torch.cond(features.sum() > 0, lambda map: tail(map, relu=True), torch.neg, (features,))

    with pytest.raises(ExportError, match="operators that only this package has: cbam"):
        export(Branches(), tmp_path / "a.pt2", shape=SMALL)


# E1
def test_asking_for_kernels_while_exporting_is_refused(tiny, tmp_path):
    with cbam.ops.using("fused"), pytest.raises((ExportError, ConfigError)):
        export(tiny, tmp_path / "a.pt2", shape=SMALL)
    assert files(tmp_path) == {}


# E1
def test_the_onnx_graph_has_standard_operators_only_and_names_its_dimensions(elsewhere):
    need("a.onnx")
    import onnx

    folder, _ = elsewhere
    model = onnx.load(folder / "a.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    (x,) = model.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim]
    assert (x.name, dims) == ("x", ["batch", 3, "height", "width"])
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["classes"]) == ["a", "b"]
    assert told["note"] == "c"


# E2
@pytest.mark.parametrize(
    "shape", [(1, 3, 64), (2, 3, 64, 64), (3, 3, 64, 96), (4, 3, 96, 64), (64, 3, 64, 64), (1, 2, 8, 8, 8)]
)
def test_a_graph_of_any_size_is_checked_at_three_that_it_was_not_traced_with(shape):
    traced = traced_shape(shape, dynamic=True)
    unseen = unseen_shapes(shape, dynamic=True)
    assert len({*unseen, traced}) == 4
    assert len({traced[0], *traced[2:]}) == len(traced) - 1  # equal sizes would be taken for one
    assert traced[0] > 1
    assert {seen[1] for seen in (traced, *unseen)} == {shape[1]}
    free = [axis for axis in range(len(shape)) if axis != 1]
    assert all(len({seen[axis] for seen in unseen}) > 1 for axis in free)
    assert (traced_shape(shape, dynamic=False), unseen_shapes(shape, dynamic=False)) == (shape, [shape] * 3)


# E3
def test_every_export_is_checked_with_the_same_values():
    for one, other in zip(inputs([SMALL] * 3), inputs([SMALL] * 3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(*inputs([SMALL] * 2))


# E2
def test_a_fixed_size_network_is_refused_for_dynamic_size(tmp_path):
    class OneSize(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 2, 1), nn.Linear(2 * 32 * 64, 2)

        def forward(self, x):
            return self.fc(self.conv(x).reshape(len(x), 2 * 32 * 64))

    with pytest.raises(ExportError, match="leave dynamic out"):
        export(OneSize(), tmp_path / "a.pt2", shape=SMALL, dynamic=True)
    assert files(tmp_path) == {}


# E2
@pytest.mark.parametrize("file", ["a.pt2", "a.onnx"])
def test_a_size_that_leaves_a_one_pixel_map_is_too_small_for_dynamic_size(file, tmp_path, capfd):
    need(file)
    strided = nn.Conv2d(3, 2, 3, stride=32, padding=1)
    net = nn.Sequential(strided, cbam.CBAM(2, reduction=1), nn.Flatten(2), nn.AdaptiveAvgPool1d(1))
    with pytest.raises(ExportError, match="give a larger size, or leave dynamic out"):
        export(net, tmp_path / file, shape=SMALL, dynamic=True)
    assert files(tmp_path) == {}
    assert capfd.readouterr().err == ""  # the runtime's own log is no part of the message
    assert export(net, tmp_path / file, shape=SMALL).path.is_file()
    export(net, tmp_path / file, shape=(1, 3, 64, 64), dynamic=True, overwrite=True)


# E2
@pytest.mark.parametrize("dim", [1, 3])
def test_1d_and_3d_networks_export_too(dim, tmp_path):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dim]
    net = nn.Sequential(conv(2, 4, 3), cbam.CBAM(4, reduction=2, dim=dim))
    made = export(net, tmp_path / "a.pt2", shape=(1, 2, *[16] * dim), dynamic=True)
    assert {len(shape) for shape in made.agreement.shapes} == {dim + 2}


class Made(nn.Module):
    """What `make` makes of a refined map; of any signature."""

    def __init__(self, make):
        super().__init__()
        self.conv, self.cbam, self.make = nn.Conv2d(3, 4, 3), cbam.CBAM(4), make

    def forward(self, *args):
        return self.make(self.cbam(self.conv(*args)))


# E3
@pytest.mark.parametrize("file", ["a.pt2", "a.onnx"])
@pytest.mark.parametrize(
    "make", [lambda map: (map, None), lambda map: map > 0, lambda map: {"map": map, "best": map.argmax(1)}]
)
def test_outputs_that_are_none_or_no_floats_are_compared_too(make, file, tmp_path):
    need(file)
    found = export(Made(make), tmp_path / file, shape=SMALL, dynamic=True).agreement
    assert found.difference < 1e-5
    assert len(found.shapes) == 3


def test_an_average_of_weights_exports_as_the_network_that_it_holds(tiny, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(tiny)  # its forward takes *args
    for dynamic in (False, True):
        made = export(average, tmp_path / "a.pt2", shape=SMALL, dynamic=dynamic, overwrite=True)
        assert made.agreement.difference < 1e-5


def test_a_network_that_writes_over_its_input_agrees_with_its_file(tmp_path):
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.Softmax(1))
    net.register_forward_pre_hook(lambda module, args: (args[0].sub_(0.5),))
    assert export(net, tmp_path / "a.pt2", shape=SMALL).agreement.difference < 1e-5


@pytest.mark.parametrize("file", ["a.pt2", "a.onnx"])
def test_process_wide_settings_do_not_affect_the_file(file, tiny, tmp_path):
    need(file)
    x = torch.randn(SMALL)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            made = export(tiny, tmp_path / file, shape=SMALL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.agreement.difference < 1e-5
    expected = tiny.eval()(x)
    (found,) = formats.FORMATS[made.format].read(made.path)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# E3
@pytest.mark.parametrize("wrong", [1.0001, float("nan")])
def test_a_file_that_computes_something_else_is_not_put_in_place(wrong, tiny, tmp_path, monkeypatch):
    (tmp_path / "a.pt2").write_bytes(b"the older one")
    real = formats.FORMATS["torch"]
    monkeypatch.setitem(
        formats.FORMATS,
        "torch",
        formats.Format(real.suffixes, (), real.write, lambda path: lambda x: [tiny(x) * wrong]),
    )
    with pytest.raises(ExportError, match="differs from the network"):
        export(tiny, tmp_path / "a.pt2", shape=SMALL, overwrite=True)
    assert files(tmp_path) == {"a.pt2": b"the older one"}


# E3
def test_another_class_is_refused_unless_the_two_are_as_good_as_equal():
    def swapped(x):
        return [x.flip(1)]

    for best in (100.0, -100.0):
        scores = torch.tensor([[best, best - 3e-3], [best, best]])
        with pytest.raises(ExportError, match=r"here at \(2, 2\): differs from the network by 3\.\de-05"):
            check.agreement(nn.Identity(), swapped, [scores], "here")
        near = torch.tensor([[best, best - 5e-4], [best, best]])
        assert check.agreement(nn.Identity(), swapped, [near], "here").difference < check.TOLERANCE


# E3
@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            [torch.ones(1, 4)],
            r"outputs have shapes \[\(1, 4\)\], those of the network \[\(1, 4\), \(1, 2\)\]",
        ),
        ([torch.ones(1, 4), torch.ones(2, 1)], r"outputs have shapes"),
        ([torch.ones(1, 4), torch.tensor([[2.0, 2.1]])], "differs from the network by 5.0e-02"),
        ([torch.ones(1, 4), torch.full((1, 2), float("nan"))], "differs from the network by nan"),
    ],
)
def test_every_output_is_compared(found, told):
    class Two(nn.Module):
        def forward(self, x):
            return {"first": x, "second": 2 * x[:, :2], "none": None}

    with pytest.raises(ExportError, match=told):
        check.agreement(Two(), lambda x: found, [torch.ones(1, 4)], "here")


# E3
def test_nan_in_any_network_output_is_reported():
    class Twice(nn.Module):
        def forward(self, x):
            return x, x / 0 * 0

    with pytest.raises(NonFiniteError, match=r"NaN or infinity for an input of shape \(1, 4\)"):
        check.agreement(Twice(), lambda x: [x, x], [torch.ones(1, 4)], "here")


# E3
def test_the_largest_difference_over_inputs_and_outputs_is_reported():
    def run(x):
        return [x * 1.000005, x]

    class Twice(nn.Module):
        def forward(self, x):
            return x, x

    found = check.agreement(Twice(), run, [torch.zeros(1, 4), torch.ones(1, 4), torch.ones(0, 4)], "here")
    assert found.difference == pytest.approx(5e-6, rel=0.1)
    assert found.shapes == ((1, 4), (1, 4), (0, 4))


def test_the_networks_own_input_error_is_passed_on(tmp_path):
    with pytest.raises(InputError, match=r"^built for 4 channels, got 3"):
        export(cbam.CBAM(4), tmp_path / "a.pt2", shape=SMALL)


# E3
def test_a_network_that_computes_nan_cannot_be_compared(tiny, tmp_path):
    nn.init.constant_(next(tiny.parameters()), float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        export(tiny, tmp_path / "a.pt2", shape=SMALL)
    assert files(tmp_path) == {}


# E4
def test_wrappers_and_training_mode_are_looked_through_and_left_as_they_are(tiny, tmp_path):
    plain = export(copy.deepcopy(tiny).eval(), tmp_path / "plain.pt2", shape=SMALL)
    wrapped = torch.compile(nn.DataParallel(tiny))
    tiny.layer1.eval() if hasattr(tiny, "layer1") else None
    modes = [module.training for module in wrapped.modules()]
    made = export(wrapped, tmp_path / "wrapped.pt2", shape=SMALL)
    assert [module.training for module in wrapped.modules()] == modes
    assert made.size == pytest.approx(plain.size, rel=0.02)
    x = torch.randn(SMALL)
    loaded = [torch.export.load(tmp_path / name).module()(x) for name in ("plain.pt2", "wrapped.pt2")]
    assert torch.equal(*loaded)


# E4
def test_a_module_compiled_in_place_stays_compiled(tiny):
    tiny.compile()
    compiled = tiny._compiled_call_impl
    with settled(tiny):
        assert not tiny.training
        assert not torch.is_grad_enabled()
        assert tiny._compiled_call_impl is None
        program(tiny, SMALL, dynamic=False)
    assert tiny._compiled_call_impl is compiled
    assert tiny.training


# E4
def test_a_detached_network_exports_as_the_plain_one(tiny, tmp_path):
    export(cbam.detach(tiny), tmp_path / "a.pt2", shape=SMALL)
    graph = torch.export.load(tmp_path / "a.pt2").graph
    assert not [node for node in graph.nodes if "sigmoid" in str(node.target)]


# E4
def test_a_scripted_model_is_refused(tmp_path):
    scripted = torch.jit.trace(nn.Conv2d(3, 2, 1), torch.zeros(SMALL))
    with pytest.raises(ExportError, match="scripted"):
        export(scripted, tmp_path / "a.pt2", shape=SMALL)


# E5
@pytest.mark.parametrize("file", ["a.onnx", "a.xml"])
def test_a_missing_package_is_named_before_any_work(file, tiny, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in NEEDS[file] else find(n))
    monkeypatch.setattr("cbam.portable.exporting.program", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(MissingExtraError, match=r"\(.*onnxscript.* missing\): pip install 'cbam\[export\]'"):
        export(tiny, tmp_path / file, shape=SMALL)


# E5
@pytest.mark.large
def test_an_opset_that_is_too_old_is_refused(tiny, tmp_path, caplog):
    need("a.onnx")
    with pytest.raises(ExportError, match="opset 5"):
        export(tiny, tmp_path / "a.onnx", shape=SMALL, opset=5)
    assert files(tmp_path) == {}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# E5
def test_an_exporter_too_old_for_torch_asks_for_an_upgrade(tiny, tmp_path, monkeypatch):
    need("a.onnx")

    def fail(*_, **__):
        raise ImportError("No module named 'onnxscript._framework_apis.torch_2_11'")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match="pip install --upgrade onnxscript"):
        export(tiny, tmp_path / "a.onnx", shape=SMALL)


# E5
def test_a_runtime_that_cannot_read_its_file_is_one_error(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("[ONNXRuntimeError] : 10 : INVALID_GRAPH\nand more")

    monkeypatch.setattr(torch.export, "load", fail)
    with pytest.raises(ExportError, match=r"torch cannot read the file that was written: .*INVALID_GRAPH$"):
        export(tiny, tmp_path / "a.pt2", shape=SMALL)
    assert files(tmp_path) == {}


# E5
def test_an_operator_without_a_translation_is_named(tmp_path):
    need("a.onnx")
    library = torch.library.Library("cbam_test", "FRAGMENT")
    library.define("odd(Tensor x) -> Tensor")
    library.impl("odd", lambda x: x + 1, "CPU")
    library.impl("odd", torch.empty_like, "Meta")

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return torch.ops.cbam_test.odd(self.conv(x))

    with pytest.raises(ExportError, match=r"cbam_test[.:]+odd"):
        export(Odd(), tmp_path / "a.onnx", shape=SMALL)
    assert files(tmp_path) == {}


# E5
def test_a_full_disk_leaves_the_older_file(tiny, tmp_path):
    (tmp_path / "a.pt2").write_bytes(b"the older one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(OutputError, match=r"a\.pt2 cannot be written"):
            export(tiny, tmp_path / "a.pt2", shape=SMALL, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(tmp_path) == {"a.pt2": b"the older one"}


# E5
def test_ctrl_c_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cbam.portable.exporting.agreement", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "a.pt2", shape=SMALL)
    assert list(tmp_path.iterdir()) == []


# E6
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_refused_with_what_to_do(dtype, tiny, tmp_path):
    with pytest.raises(DtypeError, match=r"call model\.float\(\)"):
        export(tiny.to(dtype), tmp_path / "a.pt2", shape=SMALL)


# E6
def test_a_quantised_network_is_refused(tmp_path):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.rest = torch.ao.nn.quantized.dynamic.Linear(3, 2), nn.Conv2d(3, 2, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop its old quantisation
        held = Held()
    with pytest.raises(DtypeError, match="fc is quantised"):
        export(held, tmp_path / "a.pt2", shape=SMALL)


@pytest.mark.parametrize(
    ("path", "options", "error", "told"),
    [
        ("a.tflite", {}, ConfigError, "expected one of torch"),
        ("a.onnx", {"to": "torch"}, ConfigError, r"a file for torch must end in \.pt2"),
        ("a.XML", {"to": "openvino"}, ConfigError, r"a file for openvino must end in \.xml"),
        ("a.pt2", {"opset": 18}, ConfigError, "opset is an ONNX setting"),
        ("a.pt2", {"shape": (1, 3, 0, 8)}, InputError, "three to five positive ints"),
        ("a.pt2", {"shape": (8, 8)}, InputError, "three to five positive ints"),
        ("a.pt2", {"shape": (1, 5, 32, 32)}, InputError, "does not accept an input"),
        ("a.pt2", {"shape": 32}, InputError, "three to five positive ints"),
        ("a.pt2", {"about": {"a": object()}}, InputError, "values that JSON can express"),
        ("a.pt2", {"about": {"a": float("nan")}}, InputError, "values that JSON can express"),
        ("a.pt2", {"about": {1: "a"}}, InputError, "names in about must be strings"),
        ("no/a.pt2", {}, OutputError, "No such file"),
        ("there.pt2", {}, ConfigError, "exists"),
    ],
)
def test_bad_arguments_are_refused(path, options, error, told, tiny, tmp_path):
    (tmp_path / "there.pt2").write_bytes(b"mine")
    with pytest.raises(error, match=told):
        export(tiny, tmp_path / path, **{"shape": SMALL} | options)
    assert files(tmp_path) == {"there.pt2": b"mine"}


def test_no_torch_module_and_no_memory_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"takes a torch\.nn\.Module"):
        export("resnet18", tmp_path / "a.pt2")  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):
        empty = nn.Conv2d(3, 2, 1)
    with pytest.raises(InputError, match="without memory"):
        export(empty, tmp_path / "a.pt2")
    half_empty = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    half_empty[1].running_mean = torch.empty(2, device="meta")
    with pytest.raises(InputError, match="without memory"):
        export(half_empty, tmp_path / "a.pt2")
    with pytest.raises(InputError, match="ReLU has no parameters"):
        export(nn.ReLU(), tmp_path / "a.pt2")


def test_exporter_warnings_and_logs_are_silenced(caplog):
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript.optimizer")]
    before = [logger.getEffectiveLevel() for logger in loggers]
    with quiet():
        warnings.warn("an exporter's own", DeprecationWarning, stacklevel=1)
        for logger in loggers:
            logger.error("an exporter's own")
    assert not caplog.records
    assert [logger.getEffectiveLevel() for logger in loggers] == before
