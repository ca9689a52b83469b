"""Kernels compiled before their first launch, in several processes: Triton's compiler keeps the interpreter to itself.

    kernels = launched_by(run)                     # run() launches nothing: what it would launch
    if missing(kernels):                           # in Triton's cache on disk
        compile_all(kernels, processes=8, timeout_s=120.0)

The processes leave their work in that cache, where a launch looks before it compiles, and touch no GPU. This stands on
parts of Triton 3.6 to 3.8 that are not its public interface: a caller must expect any exception. Launches
then compile as they always do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

KERNELS = "kernels.json"
"""The file that processes read; beside it stands an empty one for each kernel that one of them has begun."""
DYING_S = 1.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel for arguments of certain types: what Triton compiles at a first launch."""

    module: str
    name: str
    specialization: str
    """What another process compiles it from: Triton's own JSON."""
    source: ASTSource = field(compare=False)
    options: dict[str, Any] = field(compare=False)
    target: GPUTarget


def launched_by(run: Callable[[], None]) -> list[Kernel]:
    """Call `run` with launches that do nothing. Each kernel that they would have compiled in this process, once."""
    found: dict[tuple[str, str, str], Kernel] = {}
    hook, launch = knobs.runtime.jit_cache_hook, JITFunction.run

    def note(*, fn: Any, key: str, compile: dict[str, Any], **_: object) -> bool:
        name = (fn.module, fn.name, key)
        if name not in found:
            found[name] = _kernel(fn.jit_function, compile)
        return True  # that is, do not compile

    def launch_nothing(self: JITFunction, *args: Any, warmup: bool, **options: Any) -> None:
        launch(self, *args, warmup=True, **options)  # so that what was compiled before does not run either

    knobs.runtime.jit_cache_hook, JITFunction.run = note, launch_nothing
    try:
        run()
    finally:
        knobs.runtime.jit_cache_hook, JITFunction.run = hook, launch
    return list(found.values())


def missing(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Those that are not in Triton's cache on disk."""
    return [kernel for kernel in kernels if not _is_on_disk(kernel)]


def compile_all(kernels: Sequence[Kernel], processes: int, timeout_s: float) -> None:
    """Into the cache on disk. What fails, or is not done in time, is left out: see `missing`.

    kernels: all that launched_by found, in its order, and for one target. A function's hash in Triton 3.6 depends on
    which were hashed before it, so the processes do that in the order of this one; what is on disk already costs them
    next to nothing.
    """
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, KERNELS).write_text(
            json.dumps(
                {
                    "target": vars(kernels[0].target),
                    "kernels": [(kernel.module, kernel.name, kernel.specialization) for kernel in kernels],
                    "turns": turns(kernels),
                }
            )
        )
        command = [sys.executable, "-P", "-m", "baton.kernels.triton", folder]
        end = time.monotonic() + timeout_s
        try:
            for _ in range(processes):
                children.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            with suppress(subprocess.TimeoutExpired):
                for child in children:
                    child.wait(max(0.0, end - time.monotonic()))
        finally:
            for child in children:
                child.kill()
            for child in children:
                with suppress(subprocess.TimeoutExpired):
                    child.communicate(timeout=DYING_S)


def turns(kernels: Sequence[Kernel]) -> list[int]:
    """In which order to compile them: Gluon's first, which take ten times as long; then one of each function, then a
    second of each, and so on. What kernels of one function share, the code that launches them, is then made by one
    process before the others look for it."""
    seen: Counter[tuple[str, str]] = Counter()
    ranks = []
    for kernel in kernels:
        function = (kernel.module, kernel.name)
        ranks.append((type(kernel.source) is ASTSource, seen[function]))
        seen[function] += 1
    return sorted(range(len(kernels)), key=ranks.__getitem__)


def compile_in_turn(folder: str) -> None:
    """In a process of its own: those kernels of the list in `folder` that no other process has begun."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    listed = json.loads(Path(folder, KERNELS).read_text())
    driver.set_active(_TargetAlone(GPUTarget(**listed["target"])))
    functions = [getattr(import_module(module), name) for module, name, _ in listed["kernels"]]
    for function in functions:
        function.cache_key  # noqa: B018 - a hash that is kept
    for number in listed["turns"]:
        if _begin(Path(folder, str(number))):
            with suppress(Exception):  # a launch compiles it again, and raises what is wrong with it
                compiled = functions[number].preload(listed["kernels"][number][2])
                CudaLauncher(compiled.src, compiled.metadata)  # up to Triton 3.6 this compiles too, in C


def _kernel(function: Any, compile: dict[str, Any]) -> Kernel:
    """From the arguments of Triton's jit_cache_hook."""
    specialization = compile["specialization_data"]
    options = {name: _hashable(value) for name, value in json.loads(specialization)["options"].items()}
    source = function.ASTSource(function, compile["signature"], compile["constants"], compile["configs"][0])
    target = driver.active.get_current_target()
    return Kernel(function.module, function.__name__, specialization, source, options, target)


def _hashable(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


class _NotOnDisk(Exception):
    """The compiler began to compile."""


def _is_on_disk(kernel: Kernel) -> bool:
    def begin(*_: object) -> None:
        raise _NotOnDisk

    kernel.source.make_ir = begin  # asked for first, and only if the cache has nothing
    try:
        triton.compile(kernel.source, target=kernel.target, options=kernel.options)
    except _NotOnDisk:
        return False
    return True


class _TargetAlone:
    """As much of a driver as compiling asks for: Triton's own would begin to use the GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0


def _begin(mark: Path) -> bool:
    """Whether no process has begun this kernel yet."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _end_with_parent() -> None:
    """It holds the other end of the standard input, and writes nothing."""
    os.read(0, 1)
    os._exit(1)
