"""What every process needs: settings, typed messages, the ZeroMQ endpoint, life cycle, telemetry, errors.

No torch, no blocks.
"""
