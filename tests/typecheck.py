"""The runtime type checker of the tests: beartype, behind jaxtyping's import hook (installed by `conftest`).

Three kinds of annotations are left out. beartype refuses `Self`, and protocols that `isinstance` cannot ask. `Literal`
would answer before our own message for a wrong choice, which is what users see and what tests compare.
"""

from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar, get_origin

import beartype

Function = TypeVar("Function", bound=Callable[..., Any])


def checked(function: Function) -> Function:
    """`function`, whose arguments and result are checked at every call. jaxtyping calls it for every function."""
    function.__annotations__ = {
        name: hint if _can_be_checked(hint) else Any for name, hint in function.__annotations__.items()
    }
    return beartype.beartype(function)


def _can_be_checked(hint: Any) -> bool:
    protocol = getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)
    return hint is not Self and get_origin(hint) is not Literal and not protocol
