"""Which compiled kernels a call launches: those that Triton itself would choose, also from our cache.

Triton's own code runs; its compiler and driver are replaced by objects that record the launches.
"""

import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from cbam.ops import triton_backward, triton_forward, triton_gate, triton_kernels, triton_map
from cbam.ops.triton_gradients import tail_backward
from cbam.ops.triton_kernels import tail, tail_inference

# Cells that differ in a size, a type, an address, a part or a flag.
SMALL = {"shape": (2, 8, 4, 4)}
CELLS = (
    {}, SMALL, SMALL | {"nhwc": True}, SMALL | {"offset": 1}, SMALL | {"offset": 1, "nhwc": True},
    *({"shape": shape} for shape in
      ((2, 16, 4, 4), (3, 16, 4, 4), (1, 16, 4, 4), (2, 16, 1, 16), (2, 1, 4, 4))),
    *(SMALL | {"dtype": dtype} for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    *(SMALL | {"shortcut": False, "parameters": torch.float32} | more
      for more in ({}, {"offset": 1}, {"dtype": torch.float16})),
    *({name: value} for name, value in (
        ("parameters", torch.float16), ("hidden", 1), ("hidden", 16), ("norm", ""), ("norm", "running"),
        ("pools", "avg"), ("pools", "max"), ("pools", ""), ("spatial", ""), ("spatial", "running"),
        ("side", 7), ("side", 1), ("relu", False),
        ("gains", (2.0, 1.0)), ("gains", (1.0, 2.0)), ("biases", False),
    )),
    {"norm": "running", "spatial": "running"}, SMALL | {"norm": "running", "spatial": ""},
    {"norm": "", "pools": "", "relu": False},
)  # fmt: skip


class Compiled(CompiledKernel):
    """Stands for a compiled source; a launch is recorded, and nothing runs."""

    def __init__(self, source, starts):
        self.src, self.name = source, source.fn.__name__
        self.function = self.packed_metadata = None
        self.module, self._run = "loaded", self.record_launch
        self.starts = starts

    def __del__(self):
        pass

    def record_launch(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        source, names = self.src, self.src.fn.arg_names
        given = dict(zip(names, map(likeness, arguments), strict=True))
        given = {name: given[name] for name in names if source.signature[name] != "constexpr"}
        self.starts.append((self.name, (x, y, z), source.signature, source.constants, source.attrs, given))


def likeness(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.data_ptr() % 16
    return value


@pytest.fixture
def starts(monkeypatch):
    """The launches of kernels, each with what it was compiled for and its arguments."""
    found = []
    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", device)
    monkeypatch.setattr(triton.compiler, "compile", lambda source, **_: Compiled(source, found))
    for module in (triton_forward, triton_gate, triton_backward):
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                monkeypatch.setattr(kernel, "compile", None, raising=False)
                monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    triton_map._kernels.cache_clear()
    yield found
    triton_map._kernels.cache_clear()


def calls(tails):
    """Forwards, backwards, and updates of running statistics."""
    for changes in CELLS:
        case = tails.draw(tails.Cell(**changes), "cpu")
        if "batch" not in (case.cell.norm, case.cell.spatial):
            C = case.x.shape[1]
            for norm in ([None] * 4, list(torch.ones(4, C)), [torch.ones(C), None, *torch.ones(2, C)]):
                yield lambda case=case, norm=norm: tails.run_inference(tail_inference, case, norm)
        saved = tails.run(tail, case)
        yield lambda case=case: tails.run(tail, case)
        for needs in ((True, True), (True, False), (False, False)):
            wanted = dict(zip(("need_x", "need_shortcut"), needs, strict=True))
            yield lambda case=case, saved=saved, w=wanted: tails.run_backward(tail_backward, case, saved, **w)
    for C, count, kind in ((8, 32, torch.float32), (8, 31, torch.float32), (1, 32, torch.bfloat16)):
        norms = [torch.zeros(C, dtype=kind) for _ in range(2)] + [torch.zeros(1) for _ in range(2)]
        new = [torch.zeros(C) for _ in range(2)] + [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
        yield lambda r=norms, n=new, k=count: triton_kernels.track(r, n, [0.1, 0.01], k)
        yield lambda r=norms, n=new, k=count: triton_kernels.track(r[:2], n[:2], [0.1], k)


def test_a_call_launches_what_triton_would_choose(tails, starts, monkeypatch):
    every = list(calls(tails))
    random.Random(0).shuffle(every)
    chosen = []
    for call in every:  # Triton chooses at each launch
        triton_map._kernels.cache_clear()
        starts.clear()
        call()
        chosen.append(list(starts))
    assert len({str(one) for one in chosen}) > len(CELLS)
    for call in every:
        call()
    monkeypatch.setattr(JITFunction, "run", None)  # every choice is cached now
    for call, expected in zip(every, chosen, strict=True):
        starts.clear()
        call()
        assert starts == expected


def test_the_probe_ignores_an_active_fake_tensor_mode(starts):  # T35
    with FakeTensorMode():
        triton_kernels.probe(torch.device("cpu"))
    assert [name for name, *_ in starts] == ["pool"]
