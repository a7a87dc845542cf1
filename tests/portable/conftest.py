import subprocess
import sys

import pytest
import torch

from cbam.models import build

# Reads a file with its own runtime, `cbam` blocked, and compares with what the network gave.
ELSEWHERE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cbam":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch
torch.set_grad_enabled(False)
def runs(path):
    if path.endswith(".pt2"):
        return torch.export.load(path).module()
    if path.endswith(".onnx"):
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    import openvino
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])
for path in sys.argv[2:]:
    run = runs(path)
    for x, wanted in torch.load(sys.argv[1], weights_only=True):
        found = run(x)
        share = float((found - wanted).abs().max() / wanted.abs().max())
        print(path, share, torch.equal(found.argmax(1), wanted.argmax(1)))
"""


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny():
    """A small network with attention whose gates are neither open nor shut."""
    model = build("resnet_tiny+cbam", num_classes=10)
    for name, parameter in model.named_parameters():
        if "cbam" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session")
def in_a_fresh_process():
    """(folder, files) -> file -> (difference, same classes) of each pair in `pairs.pt`; cbam is not there."""

    def compared(folder, files):
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, "pairs.pt", *files],
            capture_output=True, text=True, check=False, cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = {}
        for line in done.stdout.splitlines():
            file, difference, same = line.split()
            found.setdefault(file, []).append((float(difference), same == "True"))
        return found

    return compared
