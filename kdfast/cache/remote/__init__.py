"""Caches that lie elsewhere: read through a bounded local folder, and sent there; any file system that fsspec knows."""

from kdfast.cache.remote.push import Push, push

__all__ = ["Push", "push"]
