"""Base methods and FA written a second time, from their definitions, with plain tensor operations.

They know nothing of the package but the weights: features come from the same modules, the rest is
written out here.
"""

import torch

from pretrain.models.row_random import fa_generator


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def infonce(rows, columns, tau):
    """Mean over i of -log softmax_j(rows_i . columns_j / tau)[i]."""
    logits = unit(rows) @ unit(columns).T / tau
    return -(logits.diagonal() - logits.logsumexp(dim=1)).mean()


def byol(p, t):
    """Squared distance of unit vectors."""
    return ((unit(p) - unit(t)) ** 2).sum(dim=1).mean()


def nn(t, bank):
    """Each row's nearest entry of the bank, as long as the row: NNCLR's NN(z, Q)."""
    nearest = bank[(unit(t) @ unit(bank).T).argmax(dim=1)]
    return unit(nearest) * t.norm(dim=1, keepdim=True)


def projections(model, views):
    net = model.online
    return [net.projector(net.backbone(v)) for v in views]


def online(model, views):
    """Projections and predictions of both views."""
    z = projections(model, views)
    return z, [model.online.predictor(x) for x in z]


def ema_projections(model, views):
    with torch.no_grad():
        return [model.ema.projector(model.ema.backbone(v)) for v in views]


def move_ema(model):
    """Something for the EMA network to differ in."""
    with torch.no_grad():
        for parameter in model.ema.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def gradients(model, loss):
    parameters = list(model.online.parameters())
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def assert_same_gradients(ours, expected):
    largest = max(float(g.abs().max()) for g in expected if g is not None)
    assert largest > 0
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * largest)


def step(model, views, seed=0, number=0):
    return model.step(views, fa_generator(seed, number, views.device))
