"""What prefill and decode workers share: settings, start-up, the rule by which a sequence ends. Knows no role.

It stands on kvtransfer and models, the one place below the roles where a model's tensors and a pool's blocks meet.
"""
