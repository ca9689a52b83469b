"""Guards how much of the workers one tenant may hold beside others, and that one alone may hold all."""

from __future__ import annotations

from baton.proxy.routing.router import WorkerView
from baton.proxy.routing.shares import ACTIVE_S, FREE_PART, NO_TENANT, QUEUED_S, Shares


def worker(
    role: str, requests: int = 0, rows: int = 32, free_blocks: int = 1000, tokens_s: float = 10_000
) -> WorkerView:
    return WorkerView(
        identity=f"{role}/1",
        address="",
        role=role,
        draining=False,
        requests=requests,
        tokens=0,
        free_blocks=free_blocks,
        total_blocks=1000,
        max_num_seqs=rows,
        tokens_s=tokens_s,
    )


def shares_of(*active: str) -> Shares:
    made = Shares()
    for tenant in active:
        made.see(tenant, 0.0)
    return made


def test_a_tenant_alone_has_no_bound() -> None:
    """Guards servers without tenants, and the work of one while the others are away; probes count for nothing."""
    made = shares_of("a", NO_TENANT)
    for _ in range(31):
        made.take("a", "prefill", 5000, 1)
        made.take("a", "decode", 0, 30)
    view = [worker("prefill"), worker("decode", requests=31, free_blocks=70)]
    assert made.allow("a", 5000, 30, view, 1.0)
    assert not made.contended("a", 1.0)
    made.see("b", 1.0)
    assert not made.allow("a", 5000, 30, view, 1.0) and made.contended("a", 1.0)
    assert made.allow("a", 5000, 30, view, 1.0 + ACTIVE_S)
    made.take("b", "decode", 0, 1)
    assert not made.allow("a", 5000, 30, view, 1.0 + ACTIVE_S), "it has a request"


def test_prompts_wait_in_the_proxy() -> None:
    """Guards the time that others wait for the prompts of one tenant in a worker."""
    made, view = shares_of("a", "b"), [worker("prefill"), worker("decode")]
    at_most = int(QUEUED_S * 10_000)
    assert made.allow("a", 100_000, 1, view, 0.0), "one prompt, however long"
    made.take("a", "prefill", at_most - 100, 1)
    assert made.allow("a", 100, 1, view, 0.0) and not made.allow("a", 101, 1, view, 0.0)
    assert made.allow("b", 100_000, 1, view, 0.0)
    assert made.allow("a", 100_000, 1, [*view, worker("prefill")], 0.0), "as many prompts as workers"
    assert made.allow("a", at_most + 100, 1, [worker("prefill", tokens_s=20_000), worker("decode")], 0.0)
    made.computed("a", at_most - 100)
    assert made.allow("a", 100_000, 1, view, 0.0)


def test_decode_workers_that_compute_prompts() -> None:
    """Guards clusters without prefill workers."""
    made = shares_of("a", "b")
    made.take("a", "decode", 10_000, 1)
    assert not made.allow("a", 1, 1, [worker("decode")], 0.0)
    assert made.allow("a", 1, 1, [worker("decode"), worker("decode")], 0.0)


def _rows_until_refused(made: Shares, num_blocks: int = 1) -> int:
    """Of 32 rows and 1000 blocks, which "a" takes one after the other, from time 0 on."""
    rows = 0
    free = lambda: worker("decode", requests=rows, free_blocks=1000 - rows * num_blocks)  # noqa: E731
    while made.allow("a", 100, num_blocks, [worker("prefill"), free()], 0.0):
        made.take("a", "decode", 0, num_blocks)
        rows += 1
    return rows


def test_some_rows_and_blocks_stay_free() -> None:
    """Guards against one tenant that takes all of decode: others would wait for one of its answers to end."""
    assert _rows_until_refused(shares_of("a", "b")) == 32 - int(32 * FREE_PART)
    assert _rows_until_refused(shares_of("a", "b"), num_blocks=100) == 8


def test_free_rows_and_blocks_are_there_for_small_tenants() -> None:
    """Guards against free rows that no tenant may take: a second request of a light tenant waited for an answer of
    the heavy one to end."""
    made = shares_of("a", "b")
    made.take("b", "decode", 0, 1)
    made.ask("b", 1, 1, 0.0)
    for _ in range(28):
        made.take("a", "decode", 0, 30)
    view = [worker("prefill"), worker("decode", requests=29, free_blocks=111)]
    assert made.allow("b", 100, 50, view, 0.0) and not made.allow("a", 100, 1, view, 0.0)
    for _ in range(15):
        made.take("b", "decode", 0, 1)
    assert not made.allow("b", 100, 50, view, 0.0), "it has its even part of the rows"
    made = shares_of("a", "b")
    made.take("b", "decode", 0, 451)
    assert made.allow("b", 100, 49, view, 0.0) and not made.allow("b", 100, 50, view, 0.0), "its part of the blocks"


def test_what_others_have_wanted_stays_free() -> None:
    """Guards the requests of a tenant that come together, after one that has been seen to have so many at once."""
    made = shares_of("a", "b")
    made.ask("b", 6, 60, -1.0)
    assert _rows_until_refused(made) == 32 - 9, "half as many again"
    made = shares_of("a", "b")
    made.ask("b", 6, 260, -1.0)
    assert _rows_until_refused(made, num_blocks=50) == 12, "390 of 1000 blocks"
    made = shares_of("a", "b")
    made.ask("b", 1000, 1000, -1.0)
    assert _rows_until_refused(made) == 16, "an even part"
    made = shares_of("a", "b", "c")
    made.ask("b", 6, 60, -1.0)
    for _ in range(5):
        made.take("b", "decode", 0, 1)
    assert _rows_until_refused(made) == 28, "it has five of them"


def test_a_peak_is_forgotten() -> None:
    """Guards against rows that stay free for ever after one burst."""
    made = Shares()
    made.ask("b", 9, 0, 0.0)
    for now in (ACTIVE_S + 1, 2 * ACTIVE_S + 2):
        made.ask("b", 1, 0, now)
    made.take("a", "decode", 0, 1)
    view = [worker("prefill"), worker("decode", requests=28)]
    assert made.allow("a", 100, 1, view, 2 * ACTIVE_S + 2)


def test_small_pools_have_room_for_one_of_each() -> None:
    """Guards against a tenant that may never begin."""
    made = shares_of("a", "b")
    made.ask("b", 1, 1, 0.0)
    view = [worker("prefill"), worker("decode", requests=2, rows=2, free_blocks=0)]
    assert made.allow("a", 10**6, 10**6, view, 0.0)
    made.take("a", "decode", 0, 500)
    assert not made.allow("a", 100, 1, [worker("prefill"), worker("decode", requests=1, rows=2)], 0.0)
    made.leave("a", "decode", 500)
    assert made.allow("a", 100, 1, view, 0.0)
