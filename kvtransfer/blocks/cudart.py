"""The few calls of the CUDA runtime that torch does not offer: plain allocations, IPC handles, copies between pointers.

A thin layer over cuda-bindings (a dependency of torch's CUDA builds): every return code is checked. Knows no blocks.
Only modules that need a GPU import this one, so that an installation for CPUs works without cuda-bindings.
Source: CUDA Runtime API, chapters Memory Management, Stream Management, Event Management, Peer Device Memory Access.
"""

from __future__ import annotations

from typing import Any

from cuda.bindings import runtime

LEAST_PRIORITY = 0
"""Of streams: the numbers go down to the greatest priority (cudaDeviceGetStreamPriorityRange)."""
MAX_PITCH = (1 << 31) - 1
"""Bytes: cudaDeviceProp.memPitch."""


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed."""


def use_device(index: int) -> None:
    """Make `index` the current device of this thread; cheap if it is already."""
    _call(runtime.cudaSetDevice(index))


def allocate(size_bytes: int) -> int:
    """Plain device memory, which CUDA IPC can export (memory of virtual-memory allocators it cannot)."""
    return int(_call(runtime.cudaMalloc(size_bytes)))


def free(pointer: int) -> None:
    _call(runtime.cudaFree(pointer))


def fill_zero(pointer: int, size_bytes: int) -> None:
    _call(runtime.cudaMemset(pointer, 0, size_bytes))
    _call(runtime.cudaDeviceSynchronize())


def copy_async(target: int, source: int, size_bytes: int, stream: int) -> None:
    """Between any two pointers that this process knows, ordered in `stream`; pageable host memory makes it block."""
    _call(runtime.cudaMemcpyAsync(target, source, size_bytes, runtime.cudaMemcpyKind.cudaMemcpyDefault, stream))


def copy_rows_async(
    target: int, source: int, pitches: tuple[int, int], row_bytes: int, num_rows: int, stream: int
) -> None:
    """The same for rows that lie `pitches` bytes apart, at the target and at the source: row_bytes to MAX_PITCH."""
    kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
    _call(runtime.cudaMemcpy2DAsync(target, pitches[0], source, pitches[1], row_bytes, num_rows, kind, stream))


def copy(target: int, source: int, size_bytes: int) -> None:
    """The same, and wait for it."""
    _call(runtime.cudaMemcpy(target, source, size_bytes, runtime.cudaMemcpyKind.cudaMemcpyDefault))


def lock_pages(pointer: int, size_bytes: int) -> None:
    """Keep host memory, of whole pages, where it is: copies of any GPU then run at the bus's speed, and
    asynchronously."""
    _call(runtime.cudaHostRegister(pointer, size_bytes, runtime.cudaHostRegisterPortable))


def unlock_pages(pointer: int) -> None:
    _call(runtime.cudaHostUnregister(pointer))


def export_handle(pointer: int) -> bytes:
    """64 bytes by which another process of this host opens the allocation that starts at `pointer`."""
    return bytes(_call(runtime.cudaIpcGetMemHandle(pointer)).reserved)


def open_handle(handle: bytes) -> int:
    """Map another process's allocation; the exporter must not free it before `close_handle`."""
    opaque = runtime.cudaIpcMemHandle_t()
    opaque.reserved = handle
    return int(_call(runtime.cudaIpcOpenMemHandle(opaque, runtime.cudaIpcMemLazyEnablePeerAccess)))


def close_handle(pointer: int) -> None:
    _call(runtime.cudaIpcCloseMemHandle(pointer))


def create_stream(priority: int = LEAST_PRIORITY) -> int:
    """A stream of its own, not shared, that does not synchronise with the default stream."""
    return int(_call(runtime.cudaStreamCreateWithPriority(runtime.cudaStreamNonBlocking, priority)))


def destroy_stream(stream: int) -> None:
    _call(runtime.cudaStreamDestroy(stream))


def create_event(timing: bool = False) -> int:
    flags = runtime.cudaEventDefault if timing else runtime.cudaEventDisableTiming
    return int(_call(runtime.cudaEventCreateWithFlags(flags)))


def destroy_event(event: int) -> None:
    _call(runtime.cudaEventDestroy(event))


def record(event: int, stream: int) -> None:
    _call(runtime.cudaEventRecord(event, stream))


def happened(event: int) -> bool:
    """Whether everything before the event is over; raises CudaError if it failed."""
    (error,) = runtime.cudaEventQuery(event)
    if error == runtime.cudaError_t.cudaErrorNotReady:
        return False
    _call((error,))
    return True


def elapsed_s(begin: int, end: int) -> float:
    return float(_call(runtime.cudaEventElapsedTime(begin, end))) / 1e3


def device_uuid(index: int) -> str:
    """32 hex digits that name the physical device, whatever number it has in this process."""
    return bytes(_call(runtime.cudaGetDeviceProperties(index)).uuid.bytes).hex()


def device_name(index: int) -> str:
    name = _call(runtime.cudaGetDeviceProperties(index)).name
    return name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name)


def _call(result: tuple[Any, ...]) -> Any:
    """The value of a call of cuda-bindings, which returns (error, value)."""
    error, *values = result
    if error != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(error)
        runtime.cudaGetLastError()  # else the next launch of someone else's kernel reports it
        raise CudaError(f"{getattr(error, 'name', error)}: {text.decode() if isinstance(text, bytes) else text}")
    return values[0] if values else None
