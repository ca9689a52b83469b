"""The command `secret`: makes the file with the secret that all nodes of a cluster share."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from baton.node.errors import SettingsError
from baton.node.secret_file import SecretSettings, write_secret
from baton.node.settings import parse


def main(argv: Sequence[str]) -> int:
    """The exit status; an error is one line."""
    settings = parse(
        SecretSettings, argv, prog="baton secret", description="Make a secret for the links of a cluster, in a file."
    )
    try:
        write_secret(settings.file)
    except SettingsError as error:
        print(f"baton secret: error: {error}", file=sys.stderr)
        return 2
    print(f"{settings.file}: copy it to every host of the cluster, and start each node with --secret-file")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
