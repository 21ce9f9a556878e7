"""What lightly computes from given inputs; run by test_lightly.py in lightly's own environment.

usage: peer_lightly.py INPUTS.npz OUTPUTS.npz
"""

import sys

import lightly  # type: ignore  # only in the peer's environment
import numpy as np
import torch
from lightly import loss as losses  # type: ignore
from lightly.loss.swav_loss import sinkhorn  # type: ignore
from lightly.models import modules  # type: ignore


def with_gradients(loss, *inputs):
    """Value and gradients as one dict of arrays."""
    gradients = torch.autograd.grad(loss, inputs)
    return {"loss": loss.detach().reshape(()), "gradients": torch.stack(gradients)}


def cosine(z_1, z_2):
    return with_gradients(losses.NegativeCosineSimilarity()(z_1, z_2), z_1, z_2)


def nt_xent(z_1, z_2, temperature):
    return with_gradients(losses.NTXentLoss(float(temperature))(z_1, z_2), z_1, z_2)


def moco(queries, keys, temperature, size):
    """A run of several batches; what the bank held before each of them."""
    criterion = losses.NTXentLoss(float(temperature), (int(size), queries.shape[2]))
    values, banks, gradients = [], [], []
    for query, key in zip(queries, keys, strict=True):
        banks.append(criterion.memory_bank.bank.clone())
        value = criterion(query, key)
        values.append(value.detach())
        gradients += torch.autograd.grad(value, (query, key))
    return {
        "losses": torch.stack(values),
        "banks": torch.stack(banks),
        "gradients": torch.stack(gradients),
    }


def swav(scores_1, scores_2, temperature, epsilon, num_iterations):
    criterion = losses.SwaVLoss(float(temperature), int(num_iterations), float(epsilon))
    codes = sinkhorn(scores_1.detach(), int(num_iterations), float(epsilon))
    return {"codes": codes} | with_gradients(
        criterion([scores_1, scores_2], []), scores_1, scores_2
    )


def neighbours(batches, queries, size):
    """Nearest entries after the batches were enqueued; the bank's state at the end."""
    bank = modules.NNMemoryBankModule((int(size), batches.shape[2]))
    for batch in batches:
        bank(batch, update=True)
    return {"nearest": bank(queries), "bank": bank.bank, "pointer": bank.bank_ptr}


def head(kind, x, **state):
    """Outputs in training mode, then in evaluation mode, from given weights."""
    kinds = {
        "byol": modules.BYOLProjectionHead,
        "moco": modules.MoCoProjectionHead,
        "nnclr": modules.NNCLRProjectionHead,
        "simsiam": modules.SimSiamProjectionHead,
    }
    network = kinds[kind](x.shape[1], 32, 8).double()
    network.layers.load_state_dict(state)
    trained = network(x)
    return {"train": trained, "eval": network.eval()(x)}


def prototypes(x, weight, bias):
    network = modules.SwaVPrototypes(x.shape[1], len(weight)).double()
    network.heads[0].load_state_dict({"weight": weight, "bias": bias})
    network.normalize()
    return {"scores": network(torch.nn.functional.normalize(x, dim=1))}


def main(inputs, outputs):
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the first filling of a bank
    arguments: dict[str, dict[str, torch.Tensor]] = {}
    with np.load(inputs) as given:
        for name, array in given.items():
            case, argument = name.split("/")
            value = torch.from_numpy(array)
            if argument in ("z_1", "z_2", "queries", "keys", "scores_1", "scores_2"):
                value.requires_grad_()
            arguments.setdefault(case, {})[argument] = value
    cases = {
        "cosine": cosine, "nt_xent": nt_xent, "nt_xent_of_neighbours": nt_xent, "moco": moco,
        "swav": swav, "neighbours": neighbours, "neighbours_uneven": neighbours,
        "prototypes": prototypes,
    }  # fmt: skip
    results = {"version": np.array(lightly.__version__)}
    for case, values in arguments.items():
        if case.startswith("head-"):
            computed = head(case.removeprefix("head-"), **values)
        else:
            computed = cases[case](**values)
        results |= {f"{case}/{name}": value.detach().numpy() for name, value in computed.items()}
    np.savez(outputs, **results)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
