"""How much a model shall reason, as variables of its chat template: templates switch reasoning, or know levels of it.

Source: OpenAI's reasoning_effort, and the names that chat templates of the model families use. Knows no prompt.
"""

from __future__ import annotations

from collections.abc import Collection

from baton.node.errors import BadRequest

SWITCHES = ("enable_thinking", "thinking")
LEVEL = "reasoning_effort"
_NEAREST = {"minimal": "low", "xhigh": "high", "max": "high"}
"""The levels that templates know are low, medium and high."""


def effort_variables(effort: str, known: Collection[str], *, reasons: bool, param: str = LEVEL) -> dict[str, object]:
    """What `effort` sets of the variables that a template knows; `reasons`: the model does so.

    Raises BadRequest where it asks for more, or less, than the template has variables for. Without levels, "minimal"
    is off.
    """
    switches = [name for name in SWITCHES if name in known]
    off = effort == "none" or (effort == "minimal" and LEVEL not in known)
    if off and (switches or not reasons):
        return dict.fromkeys(switches, False)
    if not off and (switches or LEVEL in known):
        level = {LEVEL: _NEAREST.get(effort, effort)} if LEVEL in known else {}
        return {**dict.fromkeys(switches, True), **level}
    if effort == "medium":  # what all models do if they are not asked
        return {}
    what = "its chat template cannot change how it reasons" if reasons else "it does not reason"
    raise BadRequest(f"a reasoning effort of {effort} is not possible with this model: {what}", param=param)
