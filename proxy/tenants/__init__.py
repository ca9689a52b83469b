"""The tenants of a proxy: their keys, models, limits and caches."""
