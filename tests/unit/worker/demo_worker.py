"""A decode worker with the demo model in this process: real steps, draws and grammars, and no sockets."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import baton
from baton.decode.role import DecodeRole
from baton.decode.settings import DecodeSettings
from baton.kvtransfer.blocks.hashing import block_hashes, root_hash
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.store.client import NO_STORE
from baton.models.adapters.fills import PreparedAdapter
from baton.models.adapters.peft import read_adapter
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.drafts import Drafter
from baton.node.adapter_folder import read_facts
from baton.node.messages.control import AdapterRef, Bundle, DispatchBody, Failed, Reserve, SamplingSpec, Tokens
from baton.testing.adapter_folders import write_adapter
from baton.tests.unit.worker.bench import RecordingIo
from baton.worker.adapters import ReadAdapter, WorkerAdapters
from baton.worker.grammar_tokenizer import loading_grammar_tokenizer
from baton.worker.grammars import GrammarCompiler
from baton.worker.io_thread import FromProxy
from baton.worker.loop import Loop
from baton.worker.parts import NO_ADAPTERS, Adapters, Parts
from baton.worker.prefix_loading import PrefixLoader

FOLDER = Path(baton.__file__).parent / "models" / "demo"
END_IDS = (0, 1)
BLOCK_TOKENS = 16
MAX_MODEL_LEN = 1024
ROOT = b"r" * 32


def reader(runner: ModelRunner) -> ReadAdapter:
    """Reads adapters for a runner, as a worker does."""

    def read(path: Path) -> tuple[bytes, PreparedAdapter]:
        adapter = read_adapter(path, runner.config)
        return adapter.digest, runner.adapters.prepare(adapter)

    return read


def adapter_refs(root: Path, model: Path = FOLDER) -> dict[str, AdapterRef]:
    """Two random adapters of a model, a and b, of different ranks, in folders below `root`."""
    config, refs = ModelConfig.from_folder(model), {}
    for number, name in enumerate("ab", 1):
        folder = write_adapter(root / name, config, rank=4 * number, seed=number)
        refs[name] = AdapterRef(read_facts(folder).digest, str(folder))
    return refs


class Answer(NamedTuple):
    """What a sequence generated, and how it ended."""

    ids: tuple[int, ...]
    finish: str


class DemoWorker:
    """Answers all requests of a call at once, as far as they fit."""

    def __init__(
        self,
        num_blocks: int,
        max_num_seqs: int = 64,
        drafter: Drafter | None = None,
        folder: Path = FOLDER,
        max_model_len: int = MAX_MODEL_LEN,
        **options: Any,
    ) -> None:
        settings = DecodeSettings(spare_blocks=0, max_num_seqs=max_num_seqs, **options)
        eagle = None if settings.draft_model is None else Path(settings.draft_model)
        runner = ModelRunner.load(
            folder,
            max_model_len=max_model_len,
            eagle=eagle,
            most_drafts=settings.most_drafts,
            max_loras=settings.max_loras,
            max_lora_rank=settings.max_lora_rank,
        )
        runner.drafter = drafter or runner.drafter
        config = runner.config
        layout = KVLayout.of_model(
            num_layers=runner.num_kv_layers,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_tokens=BLOCK_TOKENS,
            dtype="float32",
        )
        runner.bind_pool(torch.zeros(runner.kv_shape(num_blocks, BLOCK_TOKENS), dtype=runner.kv_dtype))
        self._io, manager = RecordingIo(), BlockManager(num_blocks)
        with loading_grammar_tokenizer(FOLDER / "tokenizer.json", config.vocab_size, END_IDS) as tokenizer:
            self.grammars = GrammarCompiler(tokenizer, config.vocab_size, self._io.inbox.put)
        prefixes = PrefixLoader(NO_STORE, manager, layout, always=False)
        adapters: Adapters = NO_ADAPTERS
        if settings.max_loras:
            adapters = WorkerAdapters(runner.adapters, reader(runner), settings.max_loras, self._io.inbox.put)
        parts = Parts(
            runner,
            manager,
            layout,
            max_model_len,
            self._io,
            prefixes,
            grammars=self.grammars,
            adapters=adapters,
        )
        self.role = DecodeRole(
            parts,
            settings.sizes("cpu"),
            settings.spare_blocks,
            settings.role,
            most_drafts=settings.most_drafts,
            draft_reach=settings.draft_reach,
        )
        self._loop = Loop(parts, self.role, max_waiting=4096, drain_s=1.0)

    def answers(
        self,
        requests: Mapping[str, SamplingSpec],
        prompt: Iterable[int],
        known: Mapping[str, tuple[int, ...]] | None = None,
        prediction: tuple[int, ...] = (),
        root: bytes = ROOT,
        adapters: Mapping[str, AdapterRef] | None = None,
    ) -> dict[str, Answer]:
        """Of requests by name, all with one prompt; known: tokens that another worker has generated, by name; adapters
        by name."""
        self._io.sent.clear()
        prompt_ids = tuple(prompt)
        for name, sampling in requests.items():
            ids = (*prompt_ids, *(known or {}).get(name, ()))
            adapter = (adapters or {}).get(name)
            own_root = root if adapter is None else root_hash(root, lora=adapter.digest)
            body = DispatchBody(
                token_ids=ids,
                prompt_len=len(prompt_ids),
                root=own_root,
                block_hashes=block_hashes(own_root, ids, BLOCK_TOKENS),
                adapter=adapter,
                prediction_ids=prediction,
                sampling=sampling,
                deadline_s=300.0,
            )
            self._io.inbox.put(FromProxy("proxy", Reserve(request_id=name, attempt=0, body=body), time.monotonic()))
        while self.role.sequences or not self._io.inbox.empty():
            self._loop.turn(0.0)
        self._loop.check()
        failures = [(each.request_id, each.reason) for each in self._io.of(Failed)]
        assert not failures, failures
        self.accepted_prediction = sum(each.accepted_prediction for each in self._tokens())
        return self._collected()

    def _tokens(self) -> list[Tokens]:
        return [tokens for bundle in self._io.of(Bundle) for tokens in bundle.tokens]

    def _collected(self) -> dict[str, Answer]:
        ids: dict[str, list[int]] = {}
        finishes: dict[str, str] = {}
        for tokens in self._tokens():
            ids.setdefault(tokens.request_id, []).extend(tokens.ids)
            finishes[tokens.request_id] = tokens.finish or finishes.get(tokens.request_id, "")
        return {name: Answer(tuple(found), finishes[name]) for name, found in ids.items()}
