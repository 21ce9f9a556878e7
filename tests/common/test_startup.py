"""Programs start without torch's compiler, and their optimisers compute what they always did."""

import subprocess
import sys

import pytest

BEGIN = """
import gc, sys
import common.startup
assert gc.isenabled()
common.startup.begin_program()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""
MODULES = "import pretrain.engine.profiling, pretrain.run, detection.training.run"
TRAINING = """
import torch
from common.backbone import tensor_shapes
from common.resnet import NAMED
from detectron2.layers import Conv2d, ROIAlign
from pretrain.engine.optim import LARS

torch.manual_seed(0)
images, rois = torch.randn(2, 3, 8, 8), torch.tensor([[0.0, 1, 1, 6, 6], [1, 0, 2, 7, 5]])
kinds = {
    torch.optim.SGD: {"momentum": 0.9, "weight_decay": 0.1}, torch.optim.Adam: {},
    torch.optim.AdamW: {}, LARS: {"momentum": 0.9, "eta": 0.1},
}
for kind, options in kinds.items():
    model = torch.nn.Sequential(Conv2d(3, 4, 3), torch.nn.ReLU())
    optimizer = kind(model.parameters(), lr=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        ROIAlign(2, 1.0, 0)(model(images), rois).square().sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    tensor_shapes(NAMED["R18"])
    print([x.hex() for x in torch.cat([w.detach().flatten() for w in model.parameters()]).tolist()])
"""
PARTS = ("torch._dynamo", "torch._inductor", "triton")
END = f"""
print([name for name in sys.modules if name.startswith({PARTS})])
# The compiler is there where it is asked for.
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""


# Two processes that share their modules; of these no program has begun in the first.
PLAINLY_AND_AS_A_PROGRAM = f"""
import os, sys
{MODULES}
if os.fork() == 0:
    exec({TRAINING!r}, {{}})
    print(len([name for name in sys.modules if name.startswith({PARTS})]), flush=True)
    os._exit(0)
assert os.wait()[1] == 0
exec({BEGIN + TRAINING + END!r}, {{}})
"""


@pytest.mark.slow
def test_training_needs_no_compiler_and_gives_the_same_bits() -> None:
    command = [sys.executable, "-c", PLAINLY_AND_AS_A_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    *bits, num_modules = printed.splitlines()[:5]
    *of_program, compiler, compiled = printed.splitlines()[5:]
    assert int(num_modules) > 100
    assert compiler == "[]"
    assert compiled == "2.0"
    assert of_program == bits
    assert len(bits) == 4
