"""Where leaves are in the tree that Orbax sees: natural, unambiguous, and the same for ever."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibe_store.serializers.orbax_tree import places
from vibe_store.serializers.places import Place, nest
from vibe_store.serializers.tree import describe


def shape_of(tree: Any) -> Any:
    """The tree that Orbax sees, with the path of each leaf in its place."""
    return nest({place: path for path, place in places(row.path for row in describe(tree)).items()})


def leaf_at(tree: Any, place: Place) -> Any:
    for level in place:
        tree = tree[level]
    return tree


def test_attributes_and_keys_are_names_and_tuples_are_lists(nodes: Any) -> None:
    tree = {"a": nodes["Point"](1, [2, (3,)]), "b": nodes["Pair"]("x", {"c d/e.f": 4})}
    assert shape_of(tree) == {
        "a": {"x": "['a'].x", "y": ["['a'].y[0]", ["['a'].y[1][0]"]]},
        "b": {"first": "['b'].first", "second": {"c d/e.f": "['b'].second['c d/e.f']"}},
    }


def test_a_place_without_a_leaf_is_none_in_a_list_and_absent_from_a_dict() -> None:
    assert shape_of([None, 1, {"a": None, "b": 2}, ()]) == [None, "[1]", {"b": "[2]['b']"}]


def test_whole_numbers_are_a_list_unless_most_of_it_would_be_gaps() -> None:
    assert shape_of({0: 1, 2: 2}) == ["[0]", None, "[2]"]
    assert shape_of({0: 1, 10**6: 2}) == {"0": "[0]", "1000000": "[1000000]"}
    assert shape_of({-1: 1, 0: 2}) == {"-1": "[-1]", "0": "[0]"}


def test_the_root_is_the_tree_itself() -> None:
    assert shape_of(5) == ""


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": 1, "a": {"b": 2}},
        {"x": 1, "x/y": 2},
        {"": {"": 1}, ".": 2},
        {(1, "x"): 1, (1, "y"): 2},
    ],
    ids=repr,
)
def test_a_tree_whose_names_could_be_mistaken_is_flat_and_by_path(tree: Any) -> None:
    paths = [row.path for row in describe(tree)]
    assert shape_of(tree) == {path.replace("/", "%2F"): path for path in paths}


def test_a_tree_of_too_many_levels_is_flat() -> None:
    tree: Any = 1
    for _ in range(100):
        tree = [tree]
    assert shape_of(tree) == {"[0]" * 100: "[0]" * 100}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["['a']", ".b[0]", ".b[2]"], [("a",), ("b", 0), ("b", 2)]),
        (["[<flat index 1>]['k']"], [(1, "k")]),
        (["['it\\\\s']", '["it\'s"]'], [("it\\s",), ("it's",)]),
        ([r"['a\nb\x00\u2028\U000e0001']"], [("a\nb\x00\u2028\U000e0001",)]),
        ([r"""['it\'s "q"']"""], [("""it's "q\"""",)]),
        ([r"['\ud800']"], [(r"['%5Cud800']",)]),
        ([r"['\z']", r"['\U00110000']"], [(r"['%5Cz']",), (r"['%5CU00110000']",)]),
        (["[None]", "[1.5]"], [("None",), ("1.5",)]),
        (["[01]"], [("01",)]),
        (["[0]", "['0']"], [("[0]",), ("['0']",)]),
        (["['a']garbage"], [("['a']garbage",)]),
        (["['a\x00']"], [("['a%00']",)]),
        (["['\ud800']"], [("['%ED%A0%80']",)]),
    ],
)
def test_the_place_of_a_path_never_changes(paths: list[str], expected: list[Any]) -> None:
    assert list(places(paths).values()) == expected


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_leaf_of_any_tree_has_a_place_of_its_own(data: st.DataObject, any_tree: Any) -> None:
    tree = data.draw(any_tree)
    paths = [row.path for row in describe(tree)]
    found = places(paths)
    nested = nest({place: path for path, place in found.items()})
    assert [leaf_at(nested, found[path]) for path in paths] == paths
    assert len(jax.tree.leaves(nested)) == len(paths)
    names = [".".join(map(str, place)) for place in found.values()]
    assert len(set(names)) == len(names)


@settings(max_examples=200, deadline=None)
@given(paths=st.lists(st.text("ab0.'[]/\\"), unique=True, max_size=6))
def test_paths_that_no_tree_has_get_places_too(paths: list[str]) -> None:
    found = places(paths)
    nested = nest({place: path for path, place in found.items()})
    assert [leaf_at(nested, found[path]) for path in paths] == paths


def test_huge_indices_take_no_memory() -> None:
    assert np.size(shape_of({10**8: 1, 10**30: 2})) == 1
