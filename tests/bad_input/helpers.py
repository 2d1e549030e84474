"""What every message must hold: the argument, the value, what is allowed, what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

# What to do follows the value in a sentence of its own.
REMEDY = re.compile(
    r"(Pass|Choose|Did you mean|Use|Set|Leave|Draw|Give|Name|Return|Convert|Move|Lower|Unfreeze|Build|Drop) ?\S"
)


def refused(
    make: Callable[[], Any],
    argument: str,
    value: Any,
    allowed: str,
    remedy: str,
    error: type[Exception] = ValueError,
) -> None:
    """The message is ``Expected argument `name` to be ... but got value ... remedy``, in this order."""
    with pytest.raises(error) as caught:
        make()
    said = str(caught.value)
    places = [said.find(part) for part in (f"`{argument}`", allowed, f"but got {value}")]
    assert -1 not in places and places == sorted(places), said
    rest = said[places[-1] + len(f"but got {value}") :]
    assert remedy in rest and REMEDY.search(rest), said


def not_counts(least: int = 1) -> st.SearchStrategy[Any]:
    """Everything that is no integer of at least ``least``."""
    return st.one_of(
        st.integers(max_value=least - 1),
        st.booleans(),
        st.none(),
        st.floats(),
        st.text(max_size=5),
        st.lists(st.integers(), max_size=2),
    )


def not_rates() -> st.SearchStrategy[Any]:
    """Everything that is no finite number of at least 0."""
    return st.one_of(
        st.floats(max_value=0, exclude_max=True).filter(lambda x: x < 0),
        st.sampled_from([math.nan, math.inf, -math.inf]),
        st.integers(max_value=-1),
        st.booleans(),
        st.none(),
        st.text(max_size=5),
        st.lists(st.floats(), max_size=2),
    )


def not_flags() -> st.SearchStrategy[Any]:
    """Everything that is neither True nor False."""
    return st.one_of(st.integers(), st.none(), st.floats(), st.text(max_size=5), st.lists(st.booleans(), max_size=2))
