"""Which workers a request goes to, and the view of the cluster on which that is decided. Pure."""
