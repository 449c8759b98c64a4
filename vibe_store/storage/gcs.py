"""Objects in a bucket of Google Cloud Storage, through gcsfs."""

from vibe_store.storage.object_store import ObjectStore

__all__ = ["GcsStorage"]


class GcsStorage(ObjectStore):
    """Objects in a bucket of Google Cloud Storage, under ``gs://bucket/path``.

    An object is created only if none is there by ``ifGenerationMatch=0``.

    Args:
        url: ``gs://`` (or ``gcs://``) and the bucket, perhaps with a path.
        storage_options: those of ``gcsfs.GCSFileSystem``, such as ``token``, ``project`` and
            ``requester_pays``; without them, credentials are looked for where Google's own clients do.
    """
