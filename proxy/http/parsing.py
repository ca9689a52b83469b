"""Bodies of requests as models of pydantic, with errors that say to a client which parameter is wrong, and never its
value.

Knows no API: names of fields, and what is said of values that may have several shapes, come from the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from baton.node.errors import BadRequest
from baton.proxy.http.json_bounds import check_structure

Body = TypeVar("Body", bound=BaseModel)


def parse_body(model: type[Body], body: bytes, names: Collection[str], shapes: Mapping[str, str]) -> Body:
    """`body` as `model`; raises BadRequest, which names the first parameter that is wrong.

    `names` are the fields of the models inside `model`; `shapes` has errors, in place of pydantic's, by name.
    """
    check_structure(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _bad_request(error, (), {*names, *model.model_fields}, shapes) from None


def parse_value(
    model: type[Body], value: object, where: Sequence[str], names: Collection[str], shapes: Mapping[str, str]
) -> Body:
    """A part of a body that was read already, which is at `where` in it, as `parse_body`."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _bad_request(error, where, {*names, *model.model_fields}, shapes) from None


def _bad_request(
    error: ValidationError, where: Sequence[str], names: Collection[str], shapes: Mapping[str, str]
) -> BadRequest:
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if found["type"] == "json_invalid":
        return BadRequest(f"the body is not valid JSON in UTF-8: {found['msg']}", code="invalid_json")
    # A location also holds the names of a union's members, which say nothing to a client.
    path = [*where, *(str(part) for part in found["loc"] if isinstance(part, int) or part in names)]
    if found["type"] == "extra_forbidden" and path[-1:] != [str(found["loc"][-1])]:
        path.append(str(found["loc"][-1])[:64])
    if not path:
        return BadRequest(f"invalid body: {found['msg']}")
    for place, name in enumerate(path):
        if name in shapes and found["type"] != "missing":
            path = path[: place + 1]
            return BadRequest(f"{'.'.join(path)} {shapes[name]}", param=".".join(path))
    return BadRequest(f"{'.'.join(path)}: {found['msg']}", param=".".join(path))
