"""What is to be known of the methods of a device class.

The `inspect` module knows more, and takes as long to import as everything else here: it is asked only about what is no
plain function.
"""

from __future__ import annotations

from collections.abc import Callable

#: Of a code object's flags: the function is an ``async def``; it takes any number of arguments.
COROUTINE = 0x80
ANY_NUMBER = 0x04


def is_coroutine_function(function: Callable[..., object]) -> bool:
    """Whether a call gives a coroutine."""
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & COROUTINE:
        return True
    if code is not None and not hasattr(function, "__wrapped__"):
        return False
    import inspect

    return inspect.iscoroutinefunction(function)


def takes(function: Callable[..., object], count: int) -> bool:
    """Whether the function can be called with so many arguments."""
    code = getattr(function, "__code__", None)
    if code is not None and not hasattr(function, "__wrapped__"):
        optional = len(getattr(function, "__defaults__", None) or ())
        most = count if code.co_flags & ANY_NUMBER else code.co_argcount
        if code.co_argcount - optional <= count <= most and not code.co_kwonlyargcount:
            return True
    import inspect

    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True
