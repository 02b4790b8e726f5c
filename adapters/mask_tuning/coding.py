"""A binary mask as bytes: in about as many bits as its entropy, and never more than one a weight.

A mask is stored in whichever of three forms is smallest: its bits; the places of its zeros; the
places of its ones. Places are differences between neighbours, whose upper bits are coded by
Huffman's code (DEFLATE's, through zlib) and whose lower bits, which are as good as random, stand
beside it.

    byte 0      version (upper half) and form (lower half): 0 bits, 1 zeros, 2 ones
    shape       the number of axes and their sizes, seven bits a byte, lowest first
    4 bytes     CRC-32 of the shape as above and of what follows
    bits        numpy.packbits of the flattened mask
    or places   one byte b; zlib's raw stream of ⌊difference / 2^b⌋; b packed planes of lower bits
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

VERSION = 1
_BITS, _ZEROS, _ONES = range(3)
_MOST = 255  # as a byte of the stream: so many, and the next byte's
# Places have to be this much smaller: bits are decoded many times faster.
_GAIN = 0.98


class MaskFormatError(ValueError):
    """Bytes that are no mask, or a mask of a version that is not known."""


def encode_mask(mask: Tensor) -> Tensor:
    """Return a mask as bytes.

    Args:
        mask: booleans of any shape; True where the weight is kept.

    Returns:
        A uint8 vector on the CPU; the same for the same mask, wherever it is made with the same
        zlib.

    Example:
        >>> encode_mask(torch.tensor([True, False, True])).tolist()[-1]
        160
    """
    flat = mask.detach().cpu().numpy().reshape(-1)
    zeros = flat.size - int(np.count_nonzero(flat))
    bits = np.packbits(flat).tobytes()
    form, places = _BITS, bits
    if _entropy(zeros / max(flat.size, 1)) < _GAIN:
        rare, which = (_ZEROS, ~flat) if 2 * zeros <= flat.size else (_ONES, flat)
        coded = _encode_places(np.flatnonzero(which), flat.size)
        if len(coded) < _GAIN * len(bits):
            form, places = rare, coded
    shape = _numbers([mask.dim(), *mask.shape])
    check = zlib.crc32(places, zlib.crc32(shape)).to_bytes(4, "little")
    head = bytes([VERSION << 4 | form])
    return torch.frombuffer(bytearray(head + shape + check + places), dtype=torch.uint8)


def decode_mask(data: Tensor) -> Tensor:
    """Return the mask that `encode_mask` made bytes of.

    Raises:
        MaskFormatError: the bytes are damaged, no mask, or of a newer version.

    Example:
        >>> decode_mask(encode_mask(torch.tensor([True, False, True])))
        tensor([ True, False,  True])
    """
    form, shape, start, content = _head(data)
    size = math.prod(shape)
    check = int.from_bytes(content[start : start + 4], "little")
    places = content[start + 4 :]
    if zlib.crc32(places, zlib.crc32(content[1:start])) != check:
        raise MaskFormatError("a mask's bytes are damaged: their checksum is another one")
    if form == _BITS:
        flat = np.unpackbits(np.frombuffer(places, np.uint8), count=size).view(np.bool_)
    else:
        flat = np.full(size, form == _ZEROS)
        flat[_decode_places(places)] = form == _ONES
    return torch.from_numpy(flat).view(shape)


def mask_shape(data: Tensor) -> tuple[int, ...]:
    """Return the shape of an encoded mask.

    Raises:
        MaskFormatError: the bytes are no mask, or of a newer version.
    """
    return _head(data)[1]


def _head(data: Tensor) -> tuple[int, tuple[int, ...], int, bytes]:
    """Return form, shape, where the checksum stands, and the bytes."""
    content = data.detach().cpu().numpy().tobytes()
    version, form = (content[0] >> 4, content[0] & 15) if content else (0, 0)
    if version > VERSION:
        raise MaskFormatError(
            f"a mask has the format's version {version}, this graftune reads version {VERSION}: "
            "update graftune"
        )
    if version != VERSION or form > _ONES:
        raise MaskFormatError("a mask's bytes do not begin as a mask's do")
    try:
        (axes,), start = _read(content, 1, 1)
        shape, start = _read(content, start, axes)
    except IndexError:
        raise MaskFormatError("a mask's bytes are cut off") from None
    return form, tuple(shape), start, content


def _entropy(share: float) -> float:
    """Return the entropy of a bit that is one with this probability, in bits."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def _encode_places(places: np.ndarray, size: int) -> bytes:
    gaps = np.diff(places, prepend=-1) - 1
    low = max(0, int(math.log2(size / max(places.size, 1))) - 5) if size else 0
    upper = gaps >> low
    count = upper // _MOST + 1  # bytes for each
    stream = np.full(int(count.sum()), _MOST, np.uint8)
    stream[np.cumsum(count) - 1] = upper % _MOST
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    compressed = compressor.compress(stream.tobytes()) + compressor.flush()
    planes = [np.packbits((gaps >> bit & 1).astype(np.uint8)).tobytes() for bit in range(low)]
    return b"".join([bytes([low]), compressed, *planes])


def _decode_places(content: bytes) -> np.ndarray:
    low = content[0]
    reader = zlib.decompressobj(-15)
    stream = np.frombuffer(reader.decompress(content[1:]) + reader.flush(), np.uint8)
    ends = np.flatnonzero(stream < _MOST)
    gaps = np.diff(np.cumsum(stream, dtype=np.int64)[ends], prepend=0)
    planes = np.frombuffer(reader.unused_data, np.uint8)
    size = -(-ends.size // 8)
    gaps <<= low
    for bit in range(low):
        plane = np.unpackbits(planes[bit * size : (bit + 1) * size], count=ends.size)
        gaps |= plane.astype(np.int64) << bit
    return np.cumsum(gaps + 1) - 1


def _numbers(values: Iterable[int]) -> bytes:
    out = bytearray()
    for value in values:
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def _read(content: Sequence[int], start: int, count: int) -> tuple[list[int], int]:
    values = []
    for _ in range(count):
        value = shift = 0
        while True:
            byte = content[start]
            start += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        values.append(value)
    return values, start
