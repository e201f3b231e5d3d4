"""Imports of large libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing(freeze: bool = False) -> Iterator[None]:
    """Import large libraries in the block without garbage collection.

    torch, transformers and vLLM create about a million objects that are never garbage. Searching
    them again and again takes a fifth of the time of the imports. With ``freeze``, later
    collections skip all objects that exist at the end of the block, including garbage. Use it only
    in processes that do nothing but run an actor.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
        if not freeze:
            gc.unfreeze()  # to the oldest generation, which is rarely searched
    finally:
        if enabled:
            gc.enable()
