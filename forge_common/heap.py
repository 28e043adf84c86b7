"""The heap of the C library: what it keeps of the memory that was freed."""

import ctypes
import sys


def give_back_memory() -> None:
    """Returns to the system the memory that was freed.

    glibc keeps it, in pieces between what is in use. Each thread of the tokenizer has a heap of its own, from which
    nothing else is allocated. On other systems, and with another C library, this does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))
