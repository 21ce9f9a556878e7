"""The support queue: past features among which nearest neighbours are searched."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from pretrain.precision import exact_products

Distance = Literal["cosine", "truncated"]

SEARCH_BYTES = 64 * 2**20  # of similarities, or of differences, that exist at once
CAST_BYTES = 8 * 2**20  # of a half-precision bank that is turned into fp32 at once
TRUNCATION = 2.0  # in units of 1 / sqrt(d), the typical size of a component
MIN_SHORTLIST, SHORTLIST_PER_NEIGHBOUR = 64, 4  # entries that `truncated` ranks: 4 k, at least 64
CONSENSUS_TEMPERATURE = 0.1
UNKNOWN = -1  # sample id or label of an entry that came without one


@torch.no_grad()
def top_k(
    z: Float[Tensor, "n d"],
    bank: Float[Tensor, "m d"],
    k: int,
    *,
    distance: Distance = "cosine",
    is_unit: bool = True,
    excluded: Int[Tensor, " n"] | None = None,
    chunk_rows: int | None = None,
    chunk_entries: int | None = None,
    device: torch.device | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k entries nearest to each row, nearest first, in bounded memory.

    ``cosine``: similarity cos(z, b). ``truncated``: a distance in which no single dimension counts
    for more than c^2, c = ``TRUNCATION`` / sqrt(d), however far apart the vectors are there:

        D(z, b) = sum over dimensions of min((z_d - b_d)^2, c^2),   similarity 1 - D / 2,

    of vectors of unit length; where nothing is truncated, this is the cosine again. It ranks a
    shortlist of the nearest by cosine, and is blind to what lies outside it.

    Which of several equally similar entries come in is not defined.

    Args:
        z: Queries of any length and precision.
        bank: Entries in fp32, fp16 or bf16; they are compared in fp32.
        k: Neighbours for each query.
        distance: What "nearest" means.
        is_unit: Whether the entries have unit length already.
        excluded: For each query an entry that it must not find, itself for instance.
        chunk_rows: Queries that are compared at once, at most; unless given, as many as keep the
            similarities within ``SEARCH_BYTES``. The result does not depend on it, but for the
            rounding of a matrix product of a few rows.
        chunk_entries: Entries that are compared at once; unless given, all where they need no
            copy, otherwise as many as fit into ``CAST_BYTES`` in fp32.
        device: Where to compare; where the queries are, unless given.
    Returns:
        Similarities in fp32, in [-1, 1] but for rounding, and positions in the bank, both where
        the queries are.
    Raises:
        ValueError: If the bank holds fewer than k entries.
    """
    num_entries, dim = bank.shape
    device = device or z.device
    if k > num_entries:
        raise ValueError(f"asked for the {k} nearest of {num_entries} valid entries")
    is_truncated, num_ranked = distance == "truncated", k
    if is_truncated:
        num_ranked = min(max(MIN_SHORTLIST, SHORTLIST_PER_NEIGHBOUR * k), num_entries)
    if chunk_entries is None:
        needs_no_copy = is_unit and bank.dtype == torch.float32 and bank.device == device
        chunk_entries = num_entries if needs_no_copy else max(1, CAST_BYTES // (4 * dim))

    # As few chunks of queries as the memory allows, all about as long.
    width = max(min(num_entries, chunk_entries), num_ranked * dim if is_truncated else 0)
    num_chunks = math.ceil(max(1, len(z)) / (chunk_rows or max(1, SEARCH_BYTES // (4 * width))))
    length = max(1, math.ceil(len(z) / num_chunks))
    queries = z.detach().split(length)
    avoided = [None] * len(queries) if excluded is None else excluded.split(length)
    best = [
        (z.new_empty(len(rows), 0, dtype=torch.float32), z.new_empty(len(rows), 0).long())
        for rows in queries
    ]
    with exact_products(device):
        # By cosine: the bank passes once, and each chunk of queries meets each chunk of entries.
        for start in range(0, num_entries, chunk_entries):
            entries = bank[start : start + chunk_entries]
            entries = entries.to(device, torch.float32) if is_unit else _unit(entries, device)
            for number, rows in enumerate(queries):
                similarity = _unit(rows, device) @ entries.T
                if (own := avoided[number]) is not None:
                    column = own.to(device) - start
                    inside = (column >= 0) & (column < len(entries))
                    similarity[inside.nonzero()[:, 0], column[inside]] = -torch.inf
                values, found = similarity.topk(min(num_ranked, len(entries)), dim=1)
                del similarity
                values = torch.cat([best[number][0], values.to(z.device)], dim=1)
                found = torch.cat([best[number][1], found.to(z.device) + start], dim=1)
                if start:  # the best of this chunk and of those before
                    values, order = values.topk(min(num_ranked, values.shape[1]), dim=1)
                    found = found.gather(1, order)
                best[number] = values, found
            del entries  # before the next chunk is made
        # The truncated distance, of the shortlist only.
        if is_truncated:
            limit = TRUNCATION / math.sqrt(dim)
            for number, rows in enumerate(queries):
                found = best[number][1]
                # In place, on one block [n, s, d].
                difference = bank[found].float().sub_(_unit(rows, z.device).unsqueeze(1))
                distances = difference.clamp_(-limit, limit).square_().sum(dim=2)
                del difference
                values, order = (1 - distances / 2).topk(k, dim=1)
                best[number] = values, found.gather(1, order)
    similarities, positions = zip(*best, strict=True)
    return torch.cat(similarities), torch.cat(positions)


def _unit(rows: Float[Tensor, "n d"], device: torch.device) -> Float[Tensor, "n d"]:
    """A copy in fp32 with rows of length 1; a row of zeros stays one."""
    copy = rows.to(device, torch.float32, copy=True)
    return copy.div_(copy.norm(dim=1, keepdim=True).clamp_min_(1e-12))


@torch.no_grad()
def consensus(neighbours: Float[Tensor, "n k d"], z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """A robust centre of each row's k neighbours: one that is unlike the others hardly counts.

    With b_1 .. b_k of unit length,

        m_i = median over j != i of b_i . b_j,   w = softmax(m / ``CONSENSUS_TEMPERATURE``),
        centre = sum_i w_i b_i, normalised.

    The median of an even number of values is the mean of the two in the middle. Two neighbours
    weigh the same; of one, the centre is itself. If the sum has no direction, as with two
    opposite neighbours, the neighbour most similar to z takes its place; z has no other part.

    Args:
        neighbours: Of any length; they are normalised here.
        z: The queries.
    Returns:
        Centres of unit length in fp32.
    """
    num_others = neighbours.shape[1] - 1
    with exact_products(z.device):
        neighbours = functional.normalize(neighbours.detach().float(), dim=2)
        if num_others == 0:
            return neighbours[:, 0]
        similarity = neighbours @ neighbours.transpose(1, 2)
        similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # sorted behind the others
        ranked = similarity.sort(dim=2, descending=True).values
        medians = (ranked[..., (num_others - 1) // 2] + ranked[..., num_others // 2]) / 2
        weights = (medians / CONSENSUS_TEMPERATURE).softmax(dim=1)
        centre = (weights.unsqueeze(2) * neighbours).sum(dim=1)
        length = centre.norm(dim=1, keepdim=True)
        closest = (neighbours * z.detach().float().unsqueeze(1)).sum(dim=2).argmax(dim=1)
        fallback = neighbours[torch.arange(len(z), device=z.device), closest]
        return torch.where(length > 1e-6, functional.normalize(centre, dim=1), fallback)


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
        dtype: What features are stored in. float16 halves the memory and moves a stored feature's
            similarities by 2^-11 at most; they are normalised before they are rounded, and the
            search multiplies in fp32 on every device.
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
        self.size = size
        self.register_buffer("features", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sample_ids", torch.full((size,), UNKNOWN))
        self.register_buffer("labels", torch.full((size,), UNKNOWN))
        self.register_buffer("born", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("puts", torch.zeros((), dtype=torch.int64))
        self.num_entries = 0

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """After loading the device is asked for the count, the one time."""
        super()._load_from_state_dict(*arguments)
        self.num_entries = int(self.count)

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
        """
        features = functional.normalize(features.detach().float(), dim=1)[-self.size :]
        n = features.shape[0]
        slots = (self.position + torch.arange(n, device=features.device)) % self.size
        unknown = self.count.new_full((), UNKNOWN)
        self.puts.add_(1)
        self.features[slots] = features.to(self.features.dtype)
        self.born[slots] = self.puts
        for column, values in ((self.sample_ids, sample_ids), (self.labels, labels)):
            column[slots] = unknown if values is None else values.to(column)[-self.size :]
        self.position.copy_((self.position + n) % self.size)
        self.num_entries = min(self.num_entries + n, self.size)
        self.count.fill_(self.num_entries)

    def nearest_indices(
        self, z: Float[Tensor, "n d"], k: int, *, distance: Distance = "cosine"
    ) -> Int[Tensor, "n k"]:
        """Positions of the k nearest entries in the buffer, nearest first; see ``top_k``.

        Raises:
            ValueError: If fewer than k entries are valid.
        """
        return top_k(z, self.features[: self.num_entries], k, distance=distance)[1]

    @torch.no_grad()
    def report(
        self, indices: Int[Tensor, " n"], sample_ids: Int[Tensor, " n"], labels: Int[Tensor, " n"]
    ) -> dict[str, float]:
        """Figures on the neighbours that were found; to be asked before the next ``put``.

        Args:
            indices: One neighbour for each row: its position in the buffer.
            sample_ids: The rows' own samples; -1: unknown.
            labels: The rows' own labels; -1: none.
        Returns:
            ``neighbour_age``: mean number of puts ago, 1 for the last.
            ``self_hit_rate``: share of neighbours that show the row's own sample.
            ``neighbour_label_agreement``: share of neighbours with the row's label.
            Shares are of the pairs in which both sides are known; without any the key is absent.
        """
        figures = {"neighbour_age": float((self.puts - self.born[indices] + 1).double().mean())}
        for key, column, values in (
            ("self_hit_rate", self.sample_ids, sample_ids),
            ("neighbour_label_agreement", self.labels, labels),
        ):
            found, own = column[indices], values.to(column)
            known = (found != UNKNOWN) & (own != UNKNOWN)
            if num_known := int(known.sum()):
                figures[key] = int((known & (found == own)).sum()) / num_known
        return figures
