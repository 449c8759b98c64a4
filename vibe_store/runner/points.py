"""At which steps a run stops to save, evaluate or log: pure arithmetic, whatever the speed of the machine."""

__all__ = ["due", "first_multiple", "next_point"]


def first_multiple(step: int, stride: int) -> int:
    """Return the first multiple of ``stride`` on or past ``step``: that many steps are taken at a time."""
    return -(-step // stride) * stride


def next_point(step: int, interval: int, stride: int) -> int:
    """Return the first point after ``step``, a multiple of ``stride``.

    The points are the first multiples of ``stride`` on or past each multiple of ``interval``.
    """
    return first_multiple((step // interval + 1) * interval, stride)


def due(step: int, interval: int | None, stride: int) -> bool:
    """Say whether ``step``, a multiple of ``stride``, is such a point; without an interval none is."""
    return interval is not None and step >= interval and step % interval < stride
