"""Random numbers as a pure function of what they are for, so that a resumed run draws the same."""

import hashlib


def derive_seed(*parts: int | str, bits: int = 32) -> int:
    """Hash a tuple into a seed.

    Args:
        parts: What the random numbers are for, such as ("augment", seed, position).
        bits: Width of the result; numpy's global generator takes 32.

    Returns:
        An integer in [0, 2**bits).
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (1 << bits)
