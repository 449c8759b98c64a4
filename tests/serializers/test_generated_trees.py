"""Hundreds of generated trees come back bit for bit, and a template that differs in one leaf is refused."""

import pytest

from vibe_store.registry import get_serializer
from vibe_store.testing import SerializerContract


@pytest.mark.proof
@pytest.mark.parametrize(("name", "examples"), [("eqx", 500), ("orbax", 100)])
def test_any_tree_comes_back_and_a_template_that_differs_in_one_leaf_is_refused(
    name: str, examples: int
) -> None:
    if name == "orbax":
        pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')

    class Contract(SerializerContract):
        pass

    Contract.examples = examples
    Contract().test_any_tree_comes_back_and_a_template_that_differs_in_one_leaf_is_refused(
        get_serializer(name)
    )
