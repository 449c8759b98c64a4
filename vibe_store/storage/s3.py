"""Objects in an S3 bucket, of Amazon or of anyone who speaks its language, through s3fs."""

from vibe_store.storage.object_store import ObjectStore

__all__ = ["S3Storage"]


class S3Storage(ObjectStore):
    """Objects in an S3 bucket, under ``s3://bucket/path``.

    An object is created only if none is there by ``If-None-Match: *``, which Amazon, Cloudflare R2, MinIO and
    Ceph honour. Of a store that ignores it, two writers that create one step at the same moment may both
    believe that they did.

    Args:
        url: ``s3://`` and the bucket, perhaps with a path.
        storage_options: those of ``s3fs.S3FileSystem``, such as ``key``, ``secret``, ``token``, ``profile``,
            ``endpoint_url`` and ``requester_pays``; without them, credentials and region are looked for where
            boto3 does.
    """
