"""`import cbam` and attaching need only torch, and the package adds little to torch's import time.

Each test runs in a fresh interpreter, since this one has imported everything.
"""

import subprocess
import sys

import pytest

OPTIONAL = """
PIL captum huggingface_hub hypothesis jsonargparse lightning lightning_fabric matplotlib numpy onnx
onnxruntime onnxscript openvino pandas
pytorch_lightning rich safetensors scipy sklearn tensorboard timm torchcam torchdata torchmetrics torchvision
transformers triton yaml
""".split()

BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""

RESIDUAL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.conv1 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(C)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)

net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8))
"""


def run(program: str) -> str:
    """What `program` prints in a fresh interpreter; fails with its traceback."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_optional_packages_are_really_blocked():
    for name in ("torchvision", "triton", "numpy"):
        with pytest.raises(AssertionError, match=f"No module named '{name}'"):
            run(f"{BLOCK}\nimport {name}")


def test_import_cbam_does_not_import_torch():
    imported = run("import sys, cbam; print(*sys.modules)").split()
    assert "cbam" in imported
    assert not {"torch", *OPTIONAL} & set(imported)


def test_the_module_works_with_only_torch():
    assert (
        run(f"{BLOCK}\nimport torch, cbam\nprint(*cbam.CBAM(8)(torch.randn(1, 8, 4, 4)).shape)")
        == "1 8 4 4\n"
    )


def test_attaching_works_with_only_torch():
    program = f"""{BLOCK}{RESIDUAL}
import cbam
x = torch.randn(2, 3, 8, 8)
plain = net.eval()(x)
cbam.attach(net)
print(len(cbam.surgery.attached(net)), torch.equal(net.eval()(x), plain))
cbam.detach(net)
print(torch.equal(net(x), plain), [name for name in sys.modules if name.split(".")[0] in {OPTIONAL}])
"""
    assert run(program) == "2 True\nTrue []\n"


def test_a_room_without_optional_packages_loads_or_names_the_extra():
    program = f"""{BLOCK}
import cbam
for name in cbam.__all__:
    try:
        getattr(cbam, name)
    except cbam.CBAMError as error:
        assert type(error).__name__ == "MissingExtraError" and "pip install 'cbam[" in str(error), error
    except ImportError as error:
        print("cbam." + name, error)
"""
    assert run(program) == ""


def test_cbam_adds_little_to_the_import_of_torch():
    program = """
import time, torch
start = time.perf_counter()
import cbam
cbam.CBAM, cbam.ChannelAttention, cbam.SpatialAttention, cbam.attach
print(time.perf_counter() - start)
"""
    seconds: list[float] = []
    while min(seconds, default=1.0) >= 0.3 and len(seconds) < 3:  # the best of three on a busy machine
        seconds.append(float(run(program)))
    assert min(seconds) < 0.3, seconds


def test_without_torch_the_error_says_what_to_install():
    hidden = BLOCK.replace("in ['", "in ['torch', '", 1)
    program = f"""{hidden}
import cbam
from cbam.app.cli import main
try:
    cbam.attach
except ImportError as error:
    print(isinstance(error, cbam.errors.MissingExtraError), "pip install torch" in str(error))
print(main(["list"]))
"""
    assert run(program) == "True True\n8\n"
