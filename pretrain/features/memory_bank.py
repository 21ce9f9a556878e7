"""The support queue: past features among which nearest neighbours are searched."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

Distance = Literal["cosine", "truncated"]

SEARCH_BYTES = 64 * 2**20  # of similarities, or of differences, that exist at once
CAST_BYTES = 8 * 2**20  # of a half-precision bank that is turned into fp32 at once
MIN_SHORTLIST = 64
SHORTLIST_PER_NEIGHBOUR = 4


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in fp32: neither autocast nor TF32."""
    before = torch.get_float32_matmul_precision()
    is_rounded = before != "highest"  # setting what is set would make torch.compile start anew
    if is_rounded:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if is_rounded:
            torch.set_float32_matmul_precision(before)


@torch.no_grad()
def top_k(
    z: Float[Tensor, "n d"],
    bank: Float[Tensor, "m d"],
    k: int,
    *,
    distance: Distance = "cosine",
    truncation: float = 2.0,
    shortlist: int | None = None,
    is_unit: bool = True,
    excluded: Int[Tensor, " n"] | None = None,
    chunk_rows: int | None = None,
    chunk_entries: int | None = None,
    device: torch.device | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k entries nearest to each row, nearest first, in bounded memory.

    ``cosine``: similarity cos(z, b). ``truncated``: a distance in which no single dimension counts
    for more than c^2, c = truncation / sqrt(d), however far apart the vectors are there:

        D(z, b) = sum over dimensions of min((z_d - b_d)^2, c^2),   similarity 1 - D / 2,

    of vectors of unit length; where nothing is truncated, this is the cosine again. It is computed
    for the nearest by cosine only: exact within the shortlist, blind to what lies outside it.

    The bank passes once, in chunks, and each row's nearest are kept on the way. Which of several
    equally similar entries come in is not defined.

    Args:
        z: Queries of any length and precision.
        bank: Entries in fp32, fp16 or bf16; they are compared in fp32.
        k: Neighbours for each query.
        distance: What "nearest" means.
        truncation: In units of 1 / sqrt(d), the typical size of a component.
        shortlist: Entries that ``truncated`` ranks; 4 k, and 64 at least, unless given.
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
        ValueError: If the bank holds fewer than k entries, or an argument is out of its range.
    """
    num_entries, dim = bank.shape
    device = device or z.device
    if k > num_entries:
        raise ValueError(f"asked for the {k} nearest of {num_entries} valid entries")
    if min(k, 1 if chunk_rows is None else chunk_rows) < 1:
        raise ValueError(f"k and chunk_rows must be at least 1, got {k} and {chunk_rows}")
    if distance not in ("cosine", "truncated"):
        raise ValueError(f"distance must be 'cosine' or 'truncated', got {distance!r}")
    if not truncation > 0:
        raise ValueError(f"truncation must be positive, got {truncation}")
    is_truncated, num_ranked = distance == "truncated", k
    if is_truncated:
        num_ranked = shortlist or max(MIN_SHORTLIST, SHORTLIST_PER_NEIGHBOUR * k)
        if num_ranked < k:
            raise ValueError(f"a shortlist of {shortlist} cannot hold the {k} nearest")
        num_ranked = min(num_ranked, num_entries)
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
        if is_truncated:
            limit = truncation / math.sqrt(dim)
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
def consensus(
    neighbours: Float[Tensor, "n k d"], z: Float[Tensor, "n d"], *, temperature: float = 0.1
) -> Float[Tensor, "n d"]:
    """A robust centre of each row's k neighbours: one that is unlike the others hardly counts.

    With b_1 .. b_k of unit length,

        m_i = median over j != i of b_i . b_j,   w = softmax(m / temperature),
        centre = sum_i w_i b_i, normalised.

    The median of an even number of values is the mean of the two in the middle. Two neighbours
    weigh the same; of one, the centre is itself. If the sum has no direction, as with two
    opposite neighbours, the neighbour most similar to z takes its place; z has no other part.

    Args:
        neighbours: Of any length; they are normalised here.
        z: The queries.
        temperature: Of the weights; at infinity the centre is the plain mean.
    Returns:
        Centres of unit length in fp32.
    Raises:
        ValueError: If there is no neighbour, or the temperature is not positive.
    """
    k = neighbours.shape[1]
    if k < 1 or not temperature > 0:
        raise ValueError(
            f"a consensus needs neighbours and a positive temperature, got k={k} and {temperature}"
        )
    with exact_products(z.device):
        neighbours = functional.normalize(neighbours.detach().float(), dim=2)
        if k == 1:
            return neighbours[:, 0]
        weights = (_median_of_others(neighbours) / temperature).softmax(dim=1)
        centre = (weights.unsqueeze(2) * neighbours).sum(dim=1)
        length = centre.norm(dim=1, keepdim=True)
        closest = (neighbours * z.detach().float().unsqueeze(1)).sum(dim=2).argmax(dim=1)
        fallback = neighbours[torch.arange(len(z), device=z.device), closest]
        return torch.where(length > 1e-6, functional.normalize(centre, dim=1), fallback)


def _median_of_others(unit: Float[Tensor, "n k d"]) -> Float[Tensor, "n k"]:
    """Median similarity of each of k > 1 vectors to the k - 1 others."""
    num_others = unit.shape[1] - 1
    similarity = unit @ unit.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # sorted behind the others
    ranked = similarity.sort(dim=2, descending=True).values
    return (ranked[..., (num_others - 1) // 2] + ranked[..., num_others // 2]) / 2


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
