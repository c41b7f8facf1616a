"""Data sources: every data set behind one interface, `len(source)` records that are read by index."""

from clip_jax.data.records import BadRecord, BaseSource, Source
from clip_jax.data.sources.make import configured_source, make_source
from clip_jax.data.sources.memory import MemorySource

__all__ = ["BadRecord", "BaseSource", "MemorySource", "Source", "configured_source", "make_source"]
