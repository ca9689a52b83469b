"""What every process needs: settings, typed messages, the ZeroMQ endpoint, life cycle, telemetry, errors.

No torch, no blocks.
"""

__version__ = "0.1.0"
