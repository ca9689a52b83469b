"""Tenants from their file: at the start, and again at SIGHUP, where a bad file changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from baton.node.errors import SettingsError
from baton.node.telemetry import log_event
from baton.node.tenant_rules import TenantRules, read_tenants
from baton.proxy.tenants.tenants import Tenants

logger = logging.getLogger("proxy")


def load_tenants(path: Path, models: Sequence[str], divide: Callable[[int], int]) -> Tenants:
    """The tenants of a file; `models` are the names that are served, `divide` makes this proxy's part of a limit.
    Raises SettingsError."""
    rules = read_tenants(path)
    _warn_of_models(rules, models)
    return Tenants(rules, divide=divide)


def reload_tenants(tenants: Tenants, path: Path, models: Sequence[str]) -> None:
    """Let the file count as it is now. One that cannot be used is logged, and what counts stays."""
    try:
        rules = read_tenants(path)
    except SettingsError as error:
        log_event(logger, "tenants_kept", level=logging.ERROR, reason=str(error))
        return
    _warn_of_models(rules, models)
    tenants.replace(rules)
    log_event(logger, "tenants_reloaded", tenants=len(rules))


def _warn_of_models(rules: Mapping[str, TenantRules], models: Sequence[str]) -> None:
    """No error: proxies of several models may share a file."""
    for name, each in rules.items():
        for model in sorted(set(each.models or ()) - set(models)):
            log_event(logger, "tenant_model_unknown", level=logging.WARNING, tenant=name, model=model)
