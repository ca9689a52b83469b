"""Makes Triton's interpreter give the same results in about a quarter of the time (Triton 3.6 to 3.8).

Left alone it replaces the language's builtins by functions made anew at each call of a function, computes of each sum
of integers whether it overflows and drops the answer, as it asserts in its debug mode only, makes tables, shapes and
constants anew for each value, compares equal shapes number by number, and finds out for each operation anew what its
operands have in common.
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
    _remember_sizes()
    _remember_shapes()
    _remember_constants()
    _remember_operands()


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
        if type(self) is type(other) is core.dtype:
            return self is other or self.name == other.name
        return equal(self, other)

    interpreter._get_np_dtype, core.dtype.__eq__ = numpy_dtype, equal_or_same


def _remember_sizes() -> None:
    """The most bytes that an element of a type has."""
    sizes: dict[str, int] = {}
    unwrap, plain = core._unwrap_if_constexpr, {core.tensor, core.dtype, int, bool, float, str, type(None)}

    def fits(data: np.ndarray, dtype: core.dtype) -> bool:
        most = sizes.get(dtype.name)
        if most is None:
            most = sizes[dtype.name] = 8 if dtype.is_ptr() else max(1, dtype.primitive_bitwidth // 8)
        return data.itemsize <= most

    def new_handle(self, data: np.ndarray, dtype: core.dtype, attr: dict | None = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if not fits(data, dtype):
            self.__post_init__()  # says what does not fit

    def unwrap_others(value):
        kind = type(value)
        if kind in plain:
            return value
        return value.value if kind is core.constexpr else unwrap(value)

    interpreter._validate_np_data_size, interpreter.TensorHandle.__init__ = fits, new_handle
    core._unwrap_if_constexpr = unwrap_others


def _remember_shapes() -> None:
    """Of types and of values: triton's own tuples, which it computes types for. Equal ones become one object."""
    make_type, make_value = core.block_type.__init__, core.tensor.__init__
    broadcast, expand_dims = TritonSemantic.broadcast_impl_value, TritonSemantic.expand_dims
    common: dict[tuple[int, int], tuple[core.tuple | None, ...]] = {}
    """The shape that operands of two shapes are given, None where it is their own."""
    expanded: dict[tuple[int, int], tuple[core.tuple, tuple]] = {}
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
        self.name = f"<{text}, {element_ty.name}>"

    def new_value(self, handle, type: core.dtype) -> None:
        shape = type.shape if type.is_block() else ()
        known = of_values.get(id(shape))
        if known is None:
            make_value(self, handle, type)
            of_values[id(shape)] = known = shape, self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.numel, self.shape = known

    def broadcast_others(self, left: core.tensor, right: core.tensor) -> tuple[core.tensor, core.tensor]:
        if left.shape is right.shape:
            return left, right
        key = id(left.shape), id(right.shape)
        if key not in common:
            both = broadcast(self, left, right)
            if left.type.is_block() and right.type.is_block() and len(left.shape) == len(right.shape):
                common[key] = tuple(
                    None if new is old else new.type.shape for new, old in zip(both, (left, right), strict=True)
                )
            return both
        wide_left, wide_right = common[key]
        return with_shape(self, left, wide_left), with_shape(self, right, wide_right)

    def with_shape(self, value: core.tensor, shape: core.tuple | None) -> core.tensor:
        if shape is None:
            return value
        return core.tensor(self.builder.create_broadcast(value.handle, shape), core.block_type(value.dtype, shape))

    def expand(self, value: core.tensor, axis: int) -> core.tensor:
        key = id(value.shape), axis
        if key not in expanded:
            found = expand_dims(self, value, axis)
            if value.type.is_block():
                expanded[key] = found.type.shape, (*(slice(None),) * axis, None)
            return found
        shape, index = expanded[key]
        handle = interpreter.TensorHandle(value.handle.data[index], value.handle.dtype.scalar)
        return core.tensor(handle, core.block_type(value.dtype, shape))

    core.block_type.__init__, core.tensor.__init__ = new_type, new_value
    TritonSemantic.broadcast_impl_value, TritonSemantic.expand_dims = broadcast_others, expand


def _remember_constants() -> None:
    """Numbers as values; what would write to one would fail."""
    make_constant = TritonSemantic.scalar_constant
    found: dict[tuple[type, int | float, str], core.tensor] = {}

    def constant(self, value, dtype: core.dtype) -> core.tensor:
        if type(value) not in (bool, int, float):
            return make_constant(self, value, dtype)
        key = type(value), value or str(value), dtype.name  # 0.0 is not -0.0
        if key not in found:
            found[key] = make_constant(self, value, dtype)
            found[key].handle.data.flags.writeable = False
        return found[key]

    TritonSemantic.scalar_constant = constant


def _remember_operands() -> None:
    """Pairs of types that an operator leaves as they are, and what it makes of a constant beside a type and shape."""
    check = TritonSemantic.binary_op_type_checking_impl
    kept: set[tuple] = set()
    constants: dict[tuple, core.tensor] = {}

    def operands(self, left, right, *rules: bool, **named: bool):
        if named or type(left) is not core.tensor:
            return check(self, left, right, *rules, **named)
        if type(right) is core.tensor:
            key = left.dtype.name, right.dtype.name, rules
            if key in kept:
                return self.broadcast_impl_value(left, right)
            both = check(self, left, right, *rules)
            if all(new.dtype is old.dtype for new, old in zip(both, (left, right), strict=True)):
                kept.add(key)
            return both
        if type(right) not in (bool, int, float):
            return check(self, left, right, *rules)
        key = left.dtype.name, id(left.shape), type(right), right or str(right), rules
        if key in constants:
            return left, constants[key]
        new_left, constant = check(self, left, right, *rules)
        if new_left is left:
            constants[key] = constant
            constant.handle.data.flags.writeable = False
        return new_left, constant

    TritonSemantic.binary_op_type_checking_impl = operands
