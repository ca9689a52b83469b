"""python -m baton.proxy.text.check FOLDER [TEMPLATE]: whether a proxy can read the tokenizer and chat template of a
model folder, or a template that replaces it.

An error is one line and status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from baton.node.errors import SettingsError
from baton.proxy.text.model_text import ModelText


def main(argv: Sequence[str]) -> int:
    folder, template = [*map(Path, argv), None][:2]
    assert folder is not None
    try:
        ModelText(folder, chat_template=template).close()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
