"""What all wrappers share: the check of an argument, and the options of a launch."""

from __future__ import annotations


def require(holds: bool, message: str) -> None:
    """Raises ValueError unless the condition holds: a kernel with a wrong shape would read memory that is not its."""
    if not holds:
        raise ValueError(message)


def launch_options(num_warps: int, pdl: bool, num_stages: int | None = None) -> dict[str, int | bool]:
    """Keyword arguments of a launch. `launch_pdl` only where it is wanted: the interpreter does not know it."""
    options: dict[str, int | bool] = {"num_warps": num_warps}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if pdl:
        options["launch_pdl"] = True
    return options
