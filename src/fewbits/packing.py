"""Packing: codes of 1 to 8 bits as little-endian streams of 32-bit words, and what codes stand for.

Field i of a stream takes bits [i·b, (i+1)·b), counted from the least significant bit of word 0 upward. This is the
portable form; it moves whole fields with integer arithmetic and is the oracle of the compiled kernels.
"""

from __future__ import annotations

import math

import torch

from fewbits.schemes import Scheme

# Codes widened to 64 bits at a time.
WIDENED = 1 << 22


def words_for(count: int, bits: int) -> int:
    """32-bit words that hold `count` fields.

    >>> words_for(9, 4)
    2
    """
    return -(-count * bits // 32)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [R, C] below 2^bits along each row: int32 [R, ceil(C·bits/32)], padded with zero.

    >>> [hex(word) for word in pack_rows(torch.arange(8, dtype=torch.uint8)[None], 4)[0].tolist()]
    ['0x76543210']
    """
    return torch.cat([_packed(part, bits) for part in torch.split(codes, _rows_at_a_time(codes.shape[1]))])


def _rows_at_a_time(columns: int) -> int:
    return max(1, WIDENED // max(columns, 1))


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, columns = codes.shape
    if 8 % bits == 0:
        return _packed_bytes(codes, bits)
    # The pattern of fields and words repeats after `period` fields, which fill `words` words exactly.
    period = 32 // math.gcd(32, bits)
    words = period * bits // 32
    padded = torch.zeros((rows, -(-columns // period) * period), dtype=torch.int64, device=codes.device)
    padded[:, :columns] = codes
    fields = padded.view(rows, -1, period)
    packed = torch.zeros((rows, fields.shape[1], words + 1), dtype=torch.int64, device=codes.device)
    for index in range(period):
        word, shift = divmod(index * bits, 32)
        shifted = fields[:, :, index] << shift
        packed[:, :, word] |= shifted & 0xFFFFFFFF
        packed[:, :, word + 1] |= shifted >> 32
    stream = packed[:, :, :words].reshape(rows, -1)[:, : words_for(columns, bits)]
    return _signed_words(stream)


def _packed_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Where no field crosses bytes: a word's bytes lie in memory from the least significant one upward."""
    rows, columns = codes.shape
    fields = 8 // bits
    packed = torch.zeros((rows, words_for(columns, bits)), dtype=torch.int32, device=codes.device)
    as_bytes = packed.view(torch.uint8)
    for field in range(fields):
        own = codes[:, field::fields]
        as_bytes[:, : own.shape[1]] |= own << (field * bits)
    return packed


def _signed_words(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_rows(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of `pack_rows`: uint8 [R, columns]."""
    return torch.cat([_unpacked(part, bits, columns) for part in torch.split(words, _rows_at_a_time(columns))])


def _unpacked(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    rows = words.shape[0]
    if 8 % bits == 0:
        return _unpacked_bytes(words, bits, columns)
    period = 32 // math.gcd(32, bits)
    per_period = period * bits // 32
    count = -(-words.shape[1] // per_period)
    wide = torch.zeros((rows, count * per_period), dtype=torch.int64, device=words.device)
    wide[:, : words.shape[1]] = words.to(torch.int64) & 0xFFFFFFFF
    wide = wide.view(rows, count, per_period)
    codes = torch.empty((rows, count, period), dtype=torch.uint8, device=words.device)
    for index in range(period):
        word, shift = divmod(index * bits, 32)
        field = wide[:, :, word] >> shift
        if shift + bits > 32:
            field = field | (wide[:, :, word + 1] << (32 - shift))
        codes[:, :, index] = (field & (2**bits - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns].contiguous()


def _unpacked_bytes(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    # A copy in any case: what counts as contiguous may still have any stride where a dimension is 1.
    packed = torch.empty(words.shape, dtype=torch.int32, device=words.device).copy_(words).view(torch.uint8)
    codes = [packed >> field & 2**bits - 1 for field in range(0, 8, bits)]
    return torch.stack(codes, -1).flatten(1)[:, :columns].contiguous()


def pack_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [R, C] down each column: int32 [ceil(R·bits/32), C]."""
    return pack_rows(codes.t().contiguous(), bits).t().contiguous()


def unpack_columns(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Inverse of `pack_columns`: uint8 [rows, C]."""
    return unpack_rows(words.t().contiguous(), bits, rows).t().contiguous()


def flip_top_bit(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """8-bit codes from signed to unsigned or back: adding or taking 128 flips the top bit."""
    return (codes.contiguous().view(torch.uint8) ^ 0x80).view(dtype)


def decode_codes(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """W = (code − zero) · scale in fp32 from a solver's codes."""
    rows, columns = codes.shape
    values = codes.to(torch.float32).view(rows, scales.shape[1], -1)
    if scheme.kind == "int":
        offsets = scheme.midpoint if zeros is None else zeros.to(torch.float32)[:, :, None]
        values = values - offsets
    return (values * scales.to(torch.float32)[:, :, None]).view(rows, columns)
