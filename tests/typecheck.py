"""The runtime type checker of the tests: beartype, behind jaxtyping's import hook.

jaxtyping binds the arguments of a call twice to compare the shapes of its arrays: a third of the time of all tests. A
function without arrays has no shapes, and is given to beartype alone.

Three kinds of annotations are left out. beartype refuses `Self`, and protocols that `isinstance` cannot ask. `Literal`
would answer before our own message for a wrong choice, which is what users see and what tests compare.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

import beartype
import jaxtyping

Function = TypeVar("Function", bound=Callable[..., Any])
CONFIGURATION = beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError)


def install() -> None:
    """Checks every function of actstore and extract that is imported after this."""
    real = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
        both = real(typechecker=typechecker)
        return lambda it: both(it) if not inspect.isfunction(it) or _has_arrays(it) else _without_shapes(it)

    jaxtyping.jaxtyped = jaxtyped  # the name by which the hook finds it
    jaxtyping.install_import_hook(["actstore", "extract"], "typecheck.checked")


def checked(function: Function) -> Function:
    """`function`, whose arguments and result are checked at every call."""
    function.__annotations__ = {
        name: hint if _can_be_checked(hint) else Any for name, hint in function.__annotations__.items()
    }
    return beartype.beartype(conf=CONFIGURATION)(function)


def _without_shapes(function: Function) -> Function:
    """`function`, checked unless a test has switched jaxtyping off. One inside another is left as it is."""
    if "<locals>" in function.__qualname__:
        return function  # to make a checker for it takes longer than to run it
    strict = checked(function)
    if strict is function:  # beartype had nothing to check
        return function

    @functools.wraps(function)
    def either(*arguments: Any, **settings: Any) -> Any:
        called = function if jaxtyping.config.jaxtyping_disable else strict
        return called(*arguments, **settings)

    return either  # type: ignore[return-value]


def _has_arrays(function: Callable[..., Any]) -> bool:
    return any(_is_of_arrays(hint) for hint in function.__annotations__.values())


def _is_of_arrays(hint: Any) -> bool:
    """Whether a hint is jaxtyping's, or has one inside. A name that is not there yet may be one."""
    if isinstance(hint, str) or getattr(hint, "__module__", "").startswith("jaxtyping"):
        return True
    return any(map(_is_of_arrays, get_args(hint))) or (isinstance(hint, list) and any(map(_is_of_arrays, hint)))


def _can_be_checked(hint: Any) -> bool:
    protocol = getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)
    return hint is not Self and get_origin(hint) is not Literal and not protocol
