"""At which steps a run stops to save, evaluate or log: pure arithmetic, whatever the speed of the machine."""

__all__ = ["due", "first_multiple", "next_point"]


def first_multiple(step: int, num_envs: int) -> int:
    """Return the first multiple of ``num_envs`` on or past ``step``: that many steps are taken at a time."""
    return -(-step // num_envs) * num_envs


def next_point(step: int, interval: int, num_envs: int) -> int:
    """Return the first point after ``step``, a multiple of ``num_envs``.

    The points are the first multiples of ``num_envs`` on or past each multiple of ``interval``.
    """
    return first_multiple((step // interval + 1) * interval, num_envs)


def due(step: int, interval: int | None, num_envs: int) -> bool:
    """Say whether ``step``, a multiple of ``num_envs``, is such a point; without an interval none is."""
    return interval is not None and step >= interval and step % interval < num_envs
