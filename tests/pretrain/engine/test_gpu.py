"""What only a GPU can show: the same numbers as on the CPU, and synchronised BN."""

import copy

import pytest
import torch
import torch.distributed as torch_dist
from torch import nn

from pretrain.objectives.base import Objective
from tests.pretrain.model.references import enter, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OBJECTIVES = tuple(Objective.registry.names())
SMALL = {"num_prototypes": 20, "num_negatives": 40}


@pytest.fixture(autouse=True)
def _exact_products(_products_as_before):
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def make_filled(make_model):
    """A model in evaluation mode whose queues are full."""

    def make(objective, **fa):
        model = make_model(objective, objective_options=SMALL, **fa).eval()
        entries = torch.Generator().manual_seed(3)
        if model.queue is not None:
            model.queue.put(torch.randn(40, 12, generator=entries))
        enter(model, torch.randn(2, 40, 12, generator=entries))
        return model

    return make


def loss_and_gradients(model, views):
    output = step(model, views)
    output.loss.backward()
    return output.loss.detach().cpu(), {
        name: p.grad.cpu() for name, p in model.online.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_step_equals_the_cpu(make_filled, make_views, objective):
    """Loss and gradients of nearest-neighbour FA, which draws nothing."""
    on_cpu, views = make_filled(objective, method="nn"), make_views()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    expected, wanted = loss_and_gradients(on_cpu, views)
    loss, gradients = loss_and_gradients(on_gpu, views.cuda())
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        error = float((gradient - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-8))
        assert error < 1e-2, name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_synchronised_bn_of_one_process_is_bn(make_filled, make_views, objective, tmp_path):
    """It refuses CPU tensors, so this is where it can be tried at all."""
    plain = make_filled(objective, method="nn").cuda().train()
    synchronised = copy.deepcopy(plain)
    meeting_place = (tmp_path / "store").as_uri()
    torch_dist.init_process_group("nccl", init_method=meeting_place, rank=0, world_size=1)
    try:
        synchronised.online = nn.SyncBatchNorm.convert_sync_batchnorm(synchronised.online)
        views = make_views().cuda()
        expected, _ = loss_and_gradients(plain, views)
        loss, _ = loss_and_gradients(synchronised, views)
    finally:
        torch_dist.destroy_process_group()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
