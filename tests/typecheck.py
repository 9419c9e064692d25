"""The runtime type checker of the tests: beartype, behind jaxtyping's import hook (installed by `conftest`).

beartype refuses two things that are right for a static checker, so these annotations are left out: `Self`, and
protocols that `isinstance` cannot ask.
"""

from collections.abc import Callable
from typing import Any, Self, TypeVar

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
    return hint is not Self and not protocol
