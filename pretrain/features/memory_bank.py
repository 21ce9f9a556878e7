"""The support queue: past features among which nearest neighbours are searched."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from pretrain.features.neighbour_search import Distance, top_k

UNKNOWN = -1  # sample id or label of an entry that came without one


class SupportQueue(nn.Module):
    """A ring buffer of normalised features with a valid count.

    It starts empty: nothing is searched that was not put in. Any batch fits any size. The buffers
    are in ``state_dict`` and so in the checkpoint. Under several processes each puts the same
    global batch, so the queues stay equal; the queue lives outside the module that DDP wraps, so
    that no buffer broadcast touches it.

    Beside each entry stand the sample it was computed from, its label and the number of the put
    that brought it (from 1; 0 where nothing was put yet). They are only looked at by ``report``:
    no search depends on them.

    ``count`` says how many entries are valid and is saved; ``num_entries`` is the same number where
    the host knows it without asking the device.

    Args:
        size: Entries.
        dim: Width of a feature.
        dtype: What features are stored in. Half precision halves the memory and moves a stored
            feature's similarities by 2^-8 (bfloat16) or 2^-11 (float16) at most; they are
            normalised before they are rounded, and the search multiplies in fp32 on every device.
    """

    features: Tensor
    position: Tensor
    count: Tensor
    sample_ids: Tensor
    labels: Tensor
    born: Tensor
    puts: Tensor

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a support queue needs at least one entry, got size={size}")
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"a support queue stores float32, float16 or bfloat16, got {dtype}")
        self.size = size
        self.register_buffer("features", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sample_ids", torch.full((size,), UNKNOWN))
        self.register_buffer("labels", torch.full((size,), UNKNOWN))
        self.register_buffer("born", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("puts", torch.zeros((), dtype=torch.int64))
        self.num_entries = 0
        self.register_load_state_dict_pre_hook(_refuse_another_dtype)
        self.register_load_state_dict_post_hook(_read_count)

    @torch.no_grad()
    def put(
        self,
        features: Float[Tensor, "n d"],
        sample_ids: Int[Tensor, " n"] | None = None,
        labels: Int[Tensor, " n"] | None = None,
    ) -> None:
        """Append rows, normalised; the oldest fall out. Of more than ``size`` the last stay.

        Args:
            features: Of any length and precision.
            sample_ids: Which sample each row was computed from; -1, or None for all, if unknown.
            labels: Class of each row's sample; -1, or None for all, if it has none.
        Raises:
            ValueError: If there is not one id, or not one label, for each row.
        """
        num_rows = len(features)
        notes = [(self.sample_ids, sample_ids, "sample ids"), (self.labels, labels, "labels")]
        for _, values, name in notes:
            if values is not None and values.shape != (num_rows,):
                raise ValueError(f"got {name} {list(values.shape)} for {num_rows} rows")
        features = functional.normalize(features.detach().float(), dim=1)[-self.size :]
        n = features.shape[0]
        slots = (self.position + torch.arange(n, device=features.device)) % self.size
        unknown = self.count.new_full((), UNKNOWN)
        self.puts.add_(1)
        self.features[slots] = features.to(self.features.dtype)
        self.born[slots] = self.puts
        for column, values, _ in notes:
            column[slots] = unknown if values is None else values.to(column)[-self.size :]
        self.position.copy_((self.position + n) % self.size)
        self.num_entries = min(self.num_entries + n, self.size)
        self.count.fill_(self.num_entries)

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "n d"], k: int) -> Float[Tensor, "n k d"]:
        """The k entries of highest cosine similarity to each row, in fp32, nearest first.

        Raises:
            ValueError: If fewer than k entries are valid.
        """
        return self.features[self.nearest_indices(z, k)].float()

    def nearest_indices(
        self,
        z: Float[Tensor, "n d"],
        k: int,
        *,
        distance: Distance = "cosine",
        truncation: float = 2.0,
    ) -> Int[Tensor, "n k"]:
        """Positions of the k nearest entries in the buffer, nearest first; see ``top_k``.

        Raises:
            ValueError: If fewer than k entries are valid.
        """
        valid = self.features[: self.num_entries]
        return top_k(z, valid, k, distance=distance, truncation=truncation)[1]

    @torch.no_grad()
    def report(
        self,
        indices: Int[Tensor, " n"],
        sample_ids: Int[Tensor, " n"] | None = None,
        labels: Int[Tensor, " n"] | None = None,
    ) -> dict[str, float]:
        """Figures on the neighbours that were found; to be asked before the next ``put``.

        Args:
            indices: One neighbour for each row: its position in the buffer.
            sample_ids: The rows' own samples; -1 or None: unknown.
            labels: The rows' own labels; -1 or None: none.
        Returns:
            ``neighbour_age``: mean number of puts ago, 1 for the last.
            ``self_hit_rate``: share of neighbours that show the row's own sample.
            ``neighbour_label_agreement``: share of neighbours with the row's label.
            Shares are of the pairs in which both sides are known; without any, or without rows,
            the key is absent.
        """
        if not len(indices):
            return {}
        figures = {"neighbour_age": float((self.puts - self.born[indices] + 1).double().mean())}
        for key, column, values in (
            ("self_hit_rate", self.sample_ids, sample_ids),
            ("neighbour_label_agreement", self.labels, labels),
        ):
            if values is not None:
                share = _share_of_equals(column[indices], values.to(column))
                figures |= {} if share is None else {key: share}
        return figures


def _share_of_equals(first: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> float | None:
    """Share of equal values among the pairs that are known; None without such a pair."""
    known = (first != UNKNOWN) & (second != UNKNOWN)
    num_known, num_equal = int(known.sum()), int((known & (first == second)).sum())
    return num_equal / num_known if num_known else None


def _refuse_another_dtype(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool,
    _missing: list[str], _unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Torch would round the features silently; another size it refuses by itself."""
    stored = state.get(f"{prefix}features")
    wanted = module.get_buffer("features").dtype
    if stored is not None and stored.dtype != wanted:
        errors.append(
            f"the support queue was saved in {stored.dtype} and is {wanted} here: keep its "
            "precision, or start without the saved queue"
        )


def _read_count(module: nn.Module, _incompatible: Any) -> None:
    """After loading: the one time that the device is asked."""
    assert isinstance(module, SupportQueue)
    module.num_entries = int(module.count)
