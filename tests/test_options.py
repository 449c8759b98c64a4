"""Options that stand behind a name are read by the types in a signature."""

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, Optional

import pytest

from vibe_store.errors import InvalidValueError
from vibe_store.options import Option, options_of, read_options, split_options


def policy(
    hourly: int = 24,
    *,
    share: float = 0.5,
    dry: bool = False,
    metric: str | Callable[..., float] = "loss",
    limit: int | None = None,
    mode: Literal["min", "max", 3, None] = "min",
    text: Optional[str] = None,  # noqa: UP045 - as it may be written, too
    both: int | float | str = 0,
    function: Callable[..., float] = max,
    bare=1,
    **others: int,
) -> None: ...


SIGNATURE = inspect.signature(policy)


def read(text: str) -> dict[str, Any]:
    name, given = split_options(f"gfs:{text}")
    assert name == "gfs"
    return read_options("retention policy 'gfs'", given, SIGNATURE)


def test_a_name_alone_has_no_options() -> None:
    assert split_options("gfs") == ("gfs", {})


def test_options_stand_behind_a_colon_with_commas_between_them() -> None:
    assert split_options("gfs: hourly=24, metric = a:b=c ,text=") == (
        "gfs",
        {"hourly": "24", "metric": "a:b=c", "text": ""},
    )


@pytest.mark.parametrize("text", ["gfs:", "gfs:hourly", "gfs:=3", "gfs:hourly=1,", "gfs:,hourly=1"])
def test_what_is_no_option_and_value_is_refused_with_the_form_to_write(text: str) -> None:
    with pytest.raises(InvalidValueError, match="is no 'option=value'") as caught:
        split_options(text)
    assert repr(text) in str(caught.value)
    assert "'name:option=value,option=value'" in str(caught.value)


def test_an_option_that_is_given_twice_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="gives the option 'hourly' twice"):
        split_options("gfs:hourly=1,hourly=2")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("hourly=3", 3),
        ("hourly=-3", -3),
        ("share=1", 1.0),
        ("share=1e-3", 0.001),
        ("share=inf", float("inf")),
        ("dry=true", True),
        ("dry=False", False),
        ("metric=12", "12"),
        ("limit=None", None),
        ("limit=7", 7),
        ("mode=max", "max"),
        ("mode=3", 3),
        ("mode=none", None),
        ("text=none", None),
        ("text=x", "x"),
        ("both=1", 1),
        ("both=1.5", 1.5),
        ("both=a", "a"),
    ],
)
def test_a_value_is_read_as_the_type_of_its_option(text: str, value: object) -> None:
    (found,) = read(text).values()
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("hourly=3.5", "is a whole number; got '3.5'"),
        ("hourly=true", "is a whole number; got 'true'"),
        ("hourly=", "is a whole number; got ''"),
        ("share=x", "is a number; got 'x'"),
        ("dry=1", "is true or false; got '1'"),
        ("limit=x", "is a whole number or none; got 'x'"),
        ("mode=mean", "is 'min', 'max', 3 or none; got 'mean'"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_it_may_be(text: str, wanted: str) -> None:
    with pytest.raises(InvalidValueError, match=re.escape(wanted)) as caught:
        read(text)
    assert f"The option {text.partition('=')[0]!r} of the retention policy 'gfs'" in str(caught.value)


@pytest.mark.parametrize("name", ["function", "bare"])
def test_an_option_whose_type_no_text_has_is_to_be_given_in_python(name: str) -> None:
    with pytest.raises(InvalidValueError, match=f"option {name!r} .* cannot be given as text.*in Python"):
        read(f"{name}=1")


def test_an_unknown_option_is_answered_with_those_that_exist() -> None:
    with pytest.raises(InvalidValueError) as caught:
        read("hourli=1")
    assert str(caught.value) == (
        "The retention policy 'gfs' takes hourly, share, dry, metric, limit, mode, text, both, function and "
        "bare; 'hourli' is none of them. Did you mean 'hourly'?"
    )


def test_where_there_are_no_options_that_is_said() -> None:
    with pytest.raises(InvalidValueError, match="takes no options; 'a' is none of them"):
        read_options("serializer 'eqx'", {"a": "1"}, inspect.signature(lambda: None))


def test_a_signature_is_described_option_by_option() -> None:
    def storage(url: str, *, region: str = "eu", key: int, **others: Any) -> None: ...

    assert options_of(inspect.signature(storage), after=1) == (
        Option("region", "str", "eu", required=False),
        Option("key", "int", None, required=True),
        Option("**others", "Any", None, required=False),
    )
