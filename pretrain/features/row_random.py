"""Random numbers for some rows of a global batch."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class RowRandom:
    """Draws numbers for the whole batch and hands out those of some rows.

    So what a row gets depends on (seed, step, its place in the global batch), and not on how many
    processes or micro-batches share the work.

    Args:
        generator: The source; draws advance it by the same amount whatever ``rows`` is.
        rows: The rows that are here, out of ``num_rows``.
        num_rows: Rows of the global batch.
    """

    def __init__(self, generator: torch.Generator, rows: slice, num_rows: int) -> None:
        if not 0 <= rows.start < rows.stop <= num_rows:
            raise ValueError(f"rows {rows.start}..{rows.stop} do not lie in a batch of {num_rows}")
        self.generator, self.rows, self.num_rows = generator, rows, num_rows

    @classmethod
    def whole(cls, generator: torch.Generator, num_rows: int) -> RowRandom:
        """All rows are here."""
        return cls(generator, slice(0, num_rows), num_rows)

    def uniform(self, *tail: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """U(0, 1): [rows, *tail]."""
        return self._here(torch.rand(self._shape(tail), **self._source(dtype)))

    def normal(self, *tail: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """N(0, 1): [rows, *tail]."""
        return self._here(torch.randn(self._shape(tail), **self._source(dtype)))

    def integers(self, high: int, *tail: int) -> Tensor:
        """Uniform in 0..high-1, int64: [rows, *tail]."""
        return self._here(torch.randint(high, self._shape(tail), **self._source(torch.int64)))

    def shift(self) -> Tensor:
        """One number in 1..num_rows-1, for all rows: int64, on the generator's device.

        Raises:
            ValueError: In a batch of one.
        """
        if self.num_rows < 2:
            raise ValueError(
                f"another sample of the batch needs a batch of at least 2, got {self.num_rows}"
            )
        return torch.randint(1, self.num_rows, (), **self._source(torch.int64))

    def beta(self, alpha: float, *tail: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Beta(alpha, alpha): [rows, *tail]."""
        if alpha == 1.0:
            return self.uniform(*tail, dtype=dtype)
        first, second = self._log_gamma(alpha, tail), self._log_gamma(alpha, tail)
        return self._here(torch.sigmoid(first - second).to(dtype))  # g1 / (g1 + g2)

    def _log_gamma(self, alpha: float, tail: tuple[int, ...]) -> Tensor:
        """Logarithms of Gamma(alpha, 1) draws, as Gamma(alpha + 1) U^(1 / alpha): no underflow.

        Only this private op of torch's takes a generator.
        """
        source = self._source(torch.float64)
        shape = torch.full(
            self._shape(tail), alpha + 1, device=source["device"], dtype=torch.float64
        )
        uniform = torch.rand(self._shape(tail), **source)
        logarithm = uniform.clamp_min(torch.finfo(torch.float64).tiny).log()
        gamma = torch._standard_gamma(shape, generator=self.generator)  # type: ignore
        return gamma.log() + logarithm / alpha

    def _shape(self, tail: tuple[int, ...]) -> tuple[int, ...]:
        return (self.num_rows, *tail)

    def _source(self, dtype: torch.dtype) -> dict:
        return {"generator": self.generator, "device": self.generator.device, "dtype": dtype}

    def _here(self, draws: Tensor) -> Tensor:
        return draws[self.rows]


def fa_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """FA's random numbers of one optimiser step: a pure function of (seed, step)."""
    digest = hashlib.blake2b(f"fa|{seed}|{step}".encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return generator
