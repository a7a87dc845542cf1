"""Inspect the bytecode of a forward, and copy it so that it reads other attributes of `self`.

Only the names in a code object change. No source text is needed, and branches, closures and helper methods
are preserved.
"""

import contextlib
import dis
import functools
import inspect
import itertools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_ENTERS = ("BEFORE_WITH", "LOAD_SPECIAL")  # a `with`, until Python 3.13 and from 3.14
_LIBRARIES = {"torch", "numpy", "builtins"}  # their functions read no attributes of a block


class UnroutableError(Exception):
    """The code of a block does not permit a route; the message says why."""


def names(base: type[nn.Module]) -> set[str]:
    """All names in the code of `forward` and of the methods it reaches."""
    return {name for code in codes(base) for name in code.co_names}


def codes(base: type[nn.Module]) -> Iterator[types.CodeType]:
    """The code of `forward` and of the methods it reaches."""
    for function in _reached(base).values():
        yield from nested(function.__code__)


def all_codes(base: type[nn.Module]) -> Iterator[types.CodeType]:
    """`codes`, and the code of functions that these call or are wrapped in, except of libraries."""
    pending: list[Any] = [*_reached(base).values(), base.forward]
    seen: set[types.FunctionType] = set()
    while pending:
        function = pending.pop()
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        if function.__module__ and function.__module__.partition(".")[0] in _LIBRARIES:
            continue
        seen.add(function)
        found = [*nested(function.__code__)]
        yield from found
        with contextlib.suppress(ValueError):  # an empty cell
            pending += [cell.cell_contents for cell in function.__closure__ or ()]
        pending += [function.__globals__.get(name) for code in found for name in _global_names(code)]
        pending.append(vars(function).get("__wrapped__"))


def _global_names(code: types.CodeType) -> set[str]:
    return {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def enters_context(code: types.CodeType) -> bool:
    """Whether the code contains a `with`."""
    return any(i.opname in _ENTERS for i in dis.get_instructions(code))


def catches(code: types.CodeType) -> bool:
    """Whether the code contains a `try` or a `with`."""
    return any(i.opname == "PUSH_EXC_INFO" for i in dis.get_instructions(code))


def formats_string(code: types.CodeType) -> bool:
    """Whether the code contains an f-string."""
    return any(i.opname.startswith(("FORMAT_", "BUILD_STRING")) for i in dis.get_instructions(code))


def is_straight(base: type[nn.Module], child: str) -> bool:
    """Whether `child` is named only in `forward` itself, and is only called or compared with None.

    A deferred value must be computed under the conditions it was created in. Those of a `with`, or of a
    function that receives `child`, as `checkpoint` does, may have ended by then.
    """
    code = getattr(base.forward, "__code__", None)
    if code is None or enters_context(code):
        return False
    if [other for other in codes(base) if child in other.co_names] != [code]:
        return False
    try:
        _check_code(base.forward, child)
    except UnroutableError:
        return False
    for instruction, following in itertools.pairwise(dis.get_instructions(base.forward.__code__)):
        if instruction.argval != child or instruction.opcode not in dis.hasname:
            continue
        called = instruction.opname == "LOAD_METHOD" or "NULL|self" in instruction.argrepr  # from 3.12
        compared = following.opname.endswith(("IF_NONE", "IF_NOT_NONE"))
        if not (called or compared):
            return False
    return True


def redirected(base: type[nn.Module], others: dict[str, str]) -> dict[type[nn.Module], dict[str, Any]]:
    """Copies of the methods reached by `forward` that call a child, with that call redirected.

    By class: methods of `base`, and those found through `super()` in classes after it in the MRO.

    Args:
        others: for each child, the attribute to read instead.

    Raises:
        UnroutableError: no method names the child, or one uses the name for something else.
    """
    methods: dict[type[nn.Module], dict[str, Any]] = {}
    missing = set(others)
    for (place, name), function in _reached(base).items():
        if isinstance(inspect.getattr_static(place, name), property):
            continue
        named = {n for code in nested(function.__code__) for n in code.co_names}
        here = {child: other for child, other in others.items() if child in named}
        for child in here:
            _check_code(function, child)
        if here:
            methods.setdefault(place, {})[name] = _with_names(function, here)
            missing -= here.keys()
    if missing:
        raise UnroutableError(f"no method of {base.__name__} names {missing.pop()}")
    return methods


def _reached(base: type[nn.Module]) -> dict[tuple[type, str], types.FunctionType]:
    """`forward` and the methods and properties it uses, of `base` and through `super()`."""
    reached: dict[tuple[type, str], types.FunctionType] = {}
    pending: list[tuple[type | None, int, str]] = [(base, 0, "forward")]
    while pending:
        place, start, name = pending.pop()
        owner = next((c for c in base.__mro__[start:] if name in vars(c)), object)
        function = vars(owner).get(name)  # unbound: static and class methods are not functions here
        function = function.fget if isinstance(function, property) else function
        key = place or owner, name
        if key in reached or owner is nn.Module or not isinstance(function, types.FunctionType):
            continue
        reached[key] = function
        names = {n for code in nested(function.__code__) for n in code.co_names}
        pending += [(base, 0, n) for n in names]
        if "super" in names:
            pending += [(None, base.__mro__.index(owner) + 1, n) for n in names]
    return reached


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """`code`, and the code of functions defined in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from nested(const)


def _check_code(function: types.FunctionType, child: str) -> None:
    """Raise unless every use of the name reads an attribute of `self`, since renaming changes all uses."""
    receiver = function.__code__.co_varnames[0]
    for code in nested(function.__code__):
        before = None
        for instruction in dis.get_instructions(code):
            if instruction.argval == child and instruction.opcode in dis.hasname:
                read = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
                if not (read and before is not None and _loads(before, receiver)):
                    raise UnroutableError(
                        f"{function.__qualname__} uses the name {child} for something else too"
                    )
            before = instruction


def _loads(instruction: dis.Instruction, variable: str) -> bool:
    last = instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
    return instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and last == variable


def _with_names(function: types.FunctionType, names: dict[str, str]) -> types.FunctionType:
    """A copy of `function` that reads, for example, `self._cbam_call` instead of `self.<child>`."""
    copy = types.FunctionType(
        _code_with_names(function.__code__, names),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    functools.update_wrapper(copy, function)
    del copy.__wrapped__
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _code_with_names(code: types.CodeType, names: dict[str, str]) -> types.CodeType:
    return code.replace(
        co_names=tuple(names.get(name, name) for name in code.co_names),
        co_consts=tuple(
            _code_with_names(c, names) if isinstance(c, types.CodeType) else c for c in code.co_consts
        ),
        # Scripting finds a function's source through its file name. It must find none: that of the original
        # has no attention.
        co_filename=f"<cbam: {code.co_name} with attention at {', '.join(names)}>",
    )
