"""The proxy: HTTP and text on one side, the cluster's workers on the other; no torch, no tensors.

A request enters through `app`, is checked by `schema`, becomes token ids in `text`, and is given to an `Engine`
(`interface`), which routes and retries it; its tokens come back as text through `text` and `stop`.
"""
