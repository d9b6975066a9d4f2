"""What an .npy file says of its array before its values are read; numpy parses it as Python, so it may say anything."""

from __future__ import annotations

from tokenize import TokenError
from typing import IO, Any

import numpy as np

_LONGEST = 256  # characters; an array of numbers needs about half


def read_array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, order and type from the beginning of an .npy file.

    Parameters
    ----------
    stream : file
        At its start; afterwards where the values begin.

    Returns
    -------
    shape : tuple of int
    fortran_order : bool
    dtype : dtype

    Raises
    ------
    ValueError
        Where it is no header of version 1.0, or longer than that of an array of numbers can be.
    """
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("NPY version 1.0 was expected")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=_LONGEST)
    except (ValueError, LookupError, SyntaxError, TypeError, TokenError, RecursionError, MemoryError) as error:
        raise ValueError("its header describes no array of numbers") from error
    if any(isinstance(side, bool) for side in shape):  # which numpy takes for numbers here, and not where it reads
        raise ValueError(f"its header describes an array of shape {shape}")
    return shape, fortran, dtype
