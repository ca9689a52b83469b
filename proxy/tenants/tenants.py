"""The tenants of one proxy, found by the keys of their requests.

A tenant lives as long as its name is in the file: a reload replaces its rules, and what it does at the moment goes on.
Knows no HTTP, and no file: its rules come from `node.tenant_rules`.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from baton.node.tenant_rules import TenantRules
from baton.proxy.tenants.usage import TenantUsage

ONLY = "default"
"""The tenant that all requests are of where no file names any."""
_NO_FLOOR = -(1 << 63)


class Tenant:
    """One tenant: what it may do, and what it does."""

    def __init__(self, name: str, rules: TenantRules, usage: TenantUsage) -> None:
        self.name = name
        self.rules = rules
        self.usage = usage

    @property
    def cache_name(self) -> str:
        """What sets its prefixes apart, at every proxy and after a restart; empty: it shares those of others."""
        return "" if self.rules.cache == "shared" else self.name


class Tenants:
    """All tenants, by their keys."""

    def __init__(
        self,
        rules: Mapping[str, TenantRules],
        *,
        need_key: bool = True,
        divide: Callable[[int], int] = lambda limit: limit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`need_key`: a request without a key is of no tenant; else there is one tenant, and all requests are its.
        `divide`: this proxy's part of a limit that several proxies keep together."""
        assert need_key or len(rules) == 1, list(rules)
        self.need_key = need_key
        self._divide = divide
        self._clock = clock
        self._by_name: dict[str, Tenant] = {}
        self._keys: list[tuple[bytes, Tenant]] = []
        self.replace(rules)

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._by_name.values())

    @classmethod
    def one(cls, keys: Sequence[str]) -> Tenants:
        """One tenant without limits, that has these keys; without any, requests need none."""
        digests = tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)
        rules = TenantRules(keys_sha256=digests, priority_floor=_NO_FLOOR, admin=True, cache="shared")
        return cls({ONLY: rules}, need_key=bool(keys))

    def replace(self, rules: Mapping[str, TenantRules]) -> None:
        """Let these be the tenants from now on. Requests of others that run already get to their end."""
        known = self._by_name
        self._by_name = {name: known.get(name) or self._new(name, each) for name, each in rules.items()}
        for name, each in rules.items():
            self._by_name[name].rules = each
            self._by_name[name].usage.limit(each)
        self._keys = [
            (bytes.fromhex(digest), tenant) for tenant in self._by_name.values() for digest in tenant.rules.keys_sha256
        ]

    def of_key(self, key: bytes) -> Tenant | None:
        """The tenant that `key` belongs to. It is compared with every key, in constant time: neither how many there
        are before it nor how it differs from them shows in the time taken."""
        if not self.need_key:
            return next(iter(self._by_name.values()))
        offered = hashlib.sha256(key).digest()
        equal = [hmac.compare_digest(offered, digest) for digest, _ in self._keys]
        return next((tenant for same, (_, tenant) in zip(equal, self._keys, strict=True) if same), None)

    def _new(self, name: str, rules: TenantRules) -> Tenant:
        return Tenant(name, rules, TenantUsage(rules, self._divide, self._clock))
