"""Makes Triton's interpreter give the same results in about a third of the time (Triton 3.6 to 3.8).

Left alone it replaces the language's builtins by functions made anew at each call of a function, computes of each sum
of integers whether it overflows and drops the answer, as it asserts in its debug mode only, makes tables, shapes and
constants anew for each value, and compares equal shapes number by number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def install() -> None:
    """Replaces the interpreter's functions, once."""
    if interpreter._patch_builtin.__module__ == __name__:
        return
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    _replace_language_once()
    _remember_builtins()
    _remember_dtypes()
    _remember_shapes()
    _remember_constants()


def _replace_language_once() -> None:
    """A function that a kernel calls finds the language replaced already."""
    patch_lang, state = interpreter._patch_lang, SimpleNamespace(replaced=frozenset())
    used: dict[object, frozenset[str]] = {}

    def patch_new(fn) -> interpreter._LangPatchScope:
        if fn not in used:
            modules = filter(inspect.ismodule, fn.__globals__.values())
            used[fn] = frozenset(module.__name__ for module in modules if module in (tl, core))
        if used[fn] and used[fn] <= state.replaced:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        scope.set_attr(state, "replaced", state.replaced | used[fn])  # until the end of the launch, which restores all
        return scope

    interpreter._patch_lang = patch_new


def _remember_builtins() -> None:
    names: dict[object, list[str]] = {}
    made: dict[object, Callable] = {}
    checks_semantic = core.builtin(lambda: None).__code__

    def with_semantic(member: Callable) -> Callable:
        function = member.__wrapped__ if getattr(member, "__code__", None) is checks_semantic else member

        def call(*args, **options):
            options["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **options)

        return call

    def patch_builtin(package, builder, scope) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        if not core.is_builtin(getattr(package, names[package][0])):
            return  # all are replaced
        for name in names[package]:
            member = getattr(package, name)
            if member not in made:
                made[member] = with_semantic(member)
            scope.set_attr(package, name, made[member])

    interpreter._patch_builtin = patch_builtin


def _remember_dtypes() -> None:
    of_type, found = interpreter._get_np_dtype, dict[str, np.dtype]()

    def numpy_dtype(dtype: core.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in found:
            found[name] = of_type(dtype)
        return found[name]

    equal = core.dtype.__eq__

    def equal_or_same(self, other) -> bool:
        return self is other or equal(self, other)

    interpreter._get_np_dtype, core.dtype.__eq__ = numpy_dtype, equal_or_same


def _remember_shapes() -> None:
    """Of types and of values: triton's own tuples, which it computes types for. Equal ones become one object."""
    make_type, make_value = core.block_type.__init__, core.tensor.__init__
    broadcast = TritonSemantic.broadcast_impl_value
    of_types: dict[tuple[int, ...], tuple[core.tuple, int, str]] = {}
    of_tuples: dict[int, tuple[core.tuple, int, str]] = {}
    """By the id of their tuple, which stays alive here."""
    of_values: dict[int, tuple[object, core.constexpr, core.tuple]] = {}

    def new_type(self, element_ty: core.dtype, shape) -> None:
        known = of_tuples.get(id(shape))
        if known is None:
            sizes = tuple(core._unwrap_if_constexpr(size) for size in shape)
            if sizes not in of_types:
                make_type(self, element_ty, shape)
                of_types[sizes] = of_tuples[id(self.shape)] = self.shape, self.numel, str(self.shape)
            known = of_types[sizes]
        self.element_ty = element_ty
        self.shape, self.numel, text = known
        self.name = f"<{text}, {element_ty}>"

    def new_value(self, handle, type: core.dtype) -> None:
        shape = type.shape if type.is_block() else ()
        known = of_values.get(id(shape))
        if known is None:
            make_value(self, handle, type)
            of_values[id(shape)] = known = shape, self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.numel, self.shape = known

    def broadcast_others(self, left: core.tensor, right: core.tensor) -> tuple[core.tensor, core.tensor]:
        return (left, right) if left.shape is right.shape else broadcast(self, left, right)

    core.block_type.__init__, core.tensor.__init__ = new_type, new_value
    TritonSemantic.broadcast_impl_value = broadcast_others


def _remember_constants() -> None:
    """Numbers as values; what would write to one would fail."""
    make_constant = TritonSemantic.scalar_constant
    found: dict[tuple[type, int | float, str], core.tensor] = {}

    def constant(self, value, dtype: core.dtype) -> core.tensor:
        if type(value) not in (bool, int, float):
            return make_constant(self, value, dtype)
        key = type(value), value, dtype.name
        if key not in found:
            found[key] = make_constant(self, value, dtype)
            found[key].handle.data.flags.writeable = False
        return found[key]

    TritonSemantic.scalar_constant = constant
