"""What the proxy measures of each request and of the cluster: Prometheus metrics, timelines, traces, the dashboard."""
