"""How far the service is from its objectives, and how many workers of each role that asks for.

`objectives` measures TTFT and TPOT against the objectives; `law` makes replicas of the result. Neither starts a worker:
an autoscaler reads the gauges.
"""
