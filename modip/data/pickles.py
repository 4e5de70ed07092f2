"""Plain values out of a pickle without running it: nothing that the file names is ever imported or called.

NumPy saves a dict as a pickle, and CALVIN its annotations so. Python's own reader would call whatever the file asks
for; this one walks the instructions (pickletools, which only lists them) and knows how to make plain values, and
nothing else. A call of one of the few functions by which NumPy rebuilds arrays is kept as it stands; any other name
is an error.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

ALLOWED = {
    "numpy ndarray",
    "numpy dtype",
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
}
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip


@dataclass
class Call:
    """What the file would have called, with what, and the state it would have set."""

    name: str
    arguments: Any
    state: Any = None


def array_of_objects(data: bytes) -> Any:
    """The one object in a NumPy array of objects without dimensions, given its pickle.

    Raises ValueError for anything but plain values, and for a pickle that is damaged.
    """
    array = plain(data)
    match array:
        case Call(state=(_, (), _, _, [value])):
            return value
    raise ValueError("not one object saved by numpy.save")


def plain(data: bytes) -> Any:
    """The values of a pickle, NumPy's objects among them as `Call`. Raises ValueError."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return stack.pop()
            _execute(opcode.name, argument, stack, memo)
    except (IndexError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"damaged: {problem}") from problem
    raise ValueError("damaged: it does not end")


def integer(value: Any) -> int:
    """A whole number, be it Python's or NumPy's. Raises ValueError."""
    match value:
        case int():
            return value
        case Call(arguments=(Call(arguments=(str(kind), *_)), bytes(raw))) if kind[0] in "iu":
            return int.from_bytes(raw, "little", signed=kind[0] == "i")
    raise ValueError(f"{type(value).__name__} instead of a whole number")


def _execute(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One instruction of protocols 2 to 5 (Lib/pickletools.py says what each does)."""
    match name:
        case "PROTO" | "FRAME":
            pass
        case "MARK":
            stack.append(_MARK)
        case "BINPUT" | "LONG_BINPUT":
            memo[argument] = stack[-1]
        case "MEMOIZE":
            memo[len(memo)] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "EMPTY_LIST":
            stack.append([])
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_TUPLE":
            stack.append(())
        case "TUPLE":
            stack.append(tuple(_marked(stack)))
        case "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        case "APPENDS":
            values = _marked(stack)
            stack[-1].extend(values)
        case "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        case "SETITEMS":
            values = _marked(stack)
            stack[-1].update(zip(values[::2], values[1::2], strict=True))
        case "GLOBAL":
            stack.append(_known(argument))
        case "STACK_GLOBAL":
            inner, module = stack.pop(), stack.pop()
            stack.append(_known(f"{module} {inner}"))
        case "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(Call(called.name, arguments))
        case "BUILD":
            state = stack.pop()
            stack[-1].state = state
        case _ if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        case _ if name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        case _ if name in _VALUES:
            stack.append(argument)
        case _:
            raise ValueError(f"it holds more than plain values ({name})")


def _known(name: str) -> Call:
    if name not in ALLOWED:
        raise ValueError(f"it asks to run {name.replace(' ', '.')}")
    return Call(name, None)


def _marked(stack: list[Any]) -> list[Any]:
    """Takes what was put on the stack since the last mark."""
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise ValueError("damaged: no mark")
    values = stack[at + 1 :]
    del stack[at:]
    return values
