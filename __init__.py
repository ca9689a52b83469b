"""Baton serves large language models with prefill and decode on separate pools of workers.

The root of the repository is this package: `baton.proxy` is the folder `proxy/`. Importing it imports nothing else.
"""

__version__ = "0.1.0"
