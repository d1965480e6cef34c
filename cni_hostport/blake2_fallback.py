"""BLAKE2b (RFC 7693) for Pythons that refuse their own, as they can on machines in FIPS mode.

Names are hashed, for the shorter ones that the ruleset has (``attachment``). That keeps no secret and proves nothing,
and so is none of the uses that FIPS 140 rules; and with another hash, what is installed would no longer be found.
"""

from __future__ import annotations

import struct

BLOCK = struct.Struct("<16Q")  # bytes, as words
WORD = (1 << 64) - 1
START = (
    0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
    0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
)  # fmt: skip
# of the RFC, section 2.7: the words of a block in the order in which a round takes them, and the words that it mixes
ORDERS = (
    "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
    "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
)  # fmt: skip
MIXED = ("048c", "159d", "26ae", "37bf", "05af", "16bc", "278d", "349e")


class blake2b:  # noqa: N801 - it stands in for Python's, as far as that is used
    """The hash of ``data``, without a key, of ``digest_size`` bytes."""

    def __init__(self, data: bytes, *, digest_size: int) -> None:
        """Take all that is to be hashed."""
        state = [START[0] ^ 0x01010000 ^ digest_size, *START[1:]]
        for begin in range(0, max(len(data), 1), BLOCK.size):
            block = data[begin : begin + BLOCK.size]
            end = begin + len(block)
            _compress(state, BLOCK.unpack(block.ljust(BLOCK.size, b"\0")), end, is_last=end == len(data))
        self._digest = b"".join(word.to_bytes(8, "little") for word in state)[:digest_size]

    def hexdigest(self) -> str:
        """Return it in hexadecimal."""
        return self._digest.hex()


def _compress(state: list[int], block: tuple[int, ...], count: int, *, is_last: bool) -> None:
    words = [*state, *START[:4], START[4] ^ count, START[5], START[6] ^ (WORD if is_last else 0), START[7]]
    for order in (*ORDERS, *ORDERS[:2]):
        for step, mixed in enumerate(MIXED):
            a, b, c, d = (int(digit, 16) for digit in mixed)
            for first, second, index in ((32, 24, 0), (16, 63, 1)):
                words[a] = (words[a] + words[b] + block[int(order[2 * step + index], 16)]) & WORD
                words[d] = _rotated(words[d] ^ words[a], first)
                words[c] = (words[c] + words[d]) & WORD
                words[b] = _rotated(words[b] ^ words[c], second)
    state[:] = [old ^ one ^ other for old, one, other in zip(state, words[:8], words[8:], strict=True)]


def _rotated(word: int, bits: int) -> int:
    return word >> bits | word << 64 - bits & WORD
