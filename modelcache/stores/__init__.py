"""Where artifacts come from.

A store is any object with ``fetch`` and ``close``; see :class:`ArtifactStore`. To add one, write it, run
``modelcache.testing.check_store`` on it, and pass it to ``ModelRegistry``.
"""

from modelcache.stores.base import Artifact, ArtifactStore, NotModified
from modelcache.stores.disk_tier import DiskTier
from modelcache.stores.http import HTTPStore
from modelcache.stores.local import LocalStore
from modelcache.stores.manifest import Manifest
from modelcache.stores.memory import MemoryStore
from modelcache.stores.opening import open_store
from modelcache.stores.s3 import S3Store

__all__ = [
    "Artifact",
    "ArtifactStore",
    "DiskTier",
    "HTTPStore",
    "LocalStore",
    "Manifest",
    "MemoryStore",
    "NotModified",
    "S3Store",
    "open_store",
]
