"""One model on the CPU: loads it, and carries out steps over a pool that the caller allocated.

    runner = ModelRunner.load(folder)
    runner.bind_pool(torch.zeros(runner.kv_shape(num_blocks, block_tokens), dtype=runner.kv_dtype))
    drawn = runner.step(rows)          # see models.batch

Keeps no state between steps beyond the pool's contents: what a sequence is, the caller knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from baton.kernels import PagedKv, PlainKv, QuantisedKv
from baton.models.batch import Done, Drawn, Launched, Row
from baton.models.check import check_adapters, recipe_for
from baton.models.config import ModelConfig
from baton.models.cpu.adapters import NO_ADAPTERS, CpuAdapterSlots, RowAdapters
from baton.models.cpu.attention import PagedAttention
from baton.models.cpu.cut_vocabulary import CutVocabulary
from baton.models.cpu.decoder import Decoder, DenseDecoder
from baton.models.cpu.eagle import EagleDrafts
from baton.models.cpu.peers import NO_PEERS, FilledSlot, RankPeers
from baton.models.cpu.prompt_scores import score_prompts
from baton.models.cpu.sampler import draw_tokens
from baton.models.cpu.step_batch import StepBatch, lay_out
from baton.models.cpu.verify import Verified
from baton.models.drafts import Drafter, NgramDrafter
from baton.models.eagle_config import NO_STATIC_SCALES, EagleConfig, read_eagle
from baton.models.eagle_weights import attention_of, load_eagle
from baton.models.fallback.config import model_config
from baton.models.kv_format import KvFormat
from baton.models.kv_scales import kv_format_of
from baton.models.layer_order import no_tap
from baton.models.partition import ONLY_STAGE, WHOLE, Rank, Stage, check_partition, check_stages
from baton.models.vector_math import prepare_vector_math
from baton.models.weights import Progress, load_weights, no_progress
from baton.node.errors import InvariantBroken, SettingsError
from baton.node.messages.control import PromptLogprob

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelRunner:
    """Carries out steps of one decoder, or of a part of it, over one pool. One thread makes all calls.

    The ranks of a group share a pool in the host's memory, and each writes and reads its own heads in it. Rank 0
    launches the steps, and the others join them. Stages have pools of their layers. All but the last `advance` a step,
    and each but the first gets what the one before it has made of the step's tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        dtype: torch.dtype,
        kv_format: KvFormat | None = None,
        drafter: Drafter | None = None,
        peers: RankPeers = NO_PEERS,
        adapters: CpuAdapterSlots | None = None,
        eagle: EagleDrafts | None = None,
        stage: Stage = ONLY_STAGE,
        draft: EagleConfig | None = None,
    ) -> None:
        """dtype: of what is computed, and of keys and values unless their format is another. drafter: of rows that may
        have drafts; by default they are looked up in the sequence. draft: its layer is in the pool, behind the model's.
        eagle: its drafts in the drafter's place, from the hidden states of the steps of `decoder`; of rank 0 alone."""
        prepare_vector_math()
        self.config = config
        self.dtype = dtype
        self.kv_format = kv_format or KvFormat.plain(dtype)
        self.drafter: Drafter = drafter or NgramDrafter()
        self.adapters = adapters or CpuAdapterSlots(config, dtype)
        self._decoder, self._peers, self._stage = decoder, peers, stage
        self._eagle, self._draft = eagle, draft
        self._vocabulary = CutVocabulary(peers, config.vocab_size)
        self._attention: PagedAttention | None = None
        self.run_ahead = 0

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        load_format: str = "auto",
        quantization: str | None = None,
        max_model_len: int | None = None,
        on_progress: Progress = no_progress,
        peers: RankPeers = NO_PEERS,
        max_loras: int = 0,
        max_lora_rank: int = 0,
        eagle: Path | None = None,
        most_drafts: int = 0,
        stage: Stage = ONLY_STAGE,
    ) -> ModelRunner:
        """Reads a Hugging Face folder; raises SettingsError for what cannot be run.

        dtype: `auto` is float32 on the CPU, where it is the fastest that every machine has.
        kv_dtype: of keys and values, one of KV_DTYPES; `auto` is dtype.
        load_format: `dummy` makes random weights and reads only the configuration.
        quantization: the recipe by which plain weights become those that they would be when quantised.
        max_model_len: the longest sequence that will be computed, tokens; None: the longest that the model knows.
        peers: the other ranks, where this one holds a part of the model; stage: whose layers.
        max_loras, max_lora_rank: adapters that rows of a step may name, and the largest rank of one.
        eagle: the folder of an EAGLE-3 draft, whose layer is one more of the pool; it proposes up to `most_drafts`. Of
        several ranks the first computes it, whole.
        """
        config = model_config(folder)
        config = config.up_to(config.max_model_len if max_model_len is None else max_model_len)
        name = "float32" if dtype == "auto" else dtype
        if name not in DTYPES:
            raise SettingsError(f"dtype {dtype!r} is unknown; known: auto, {', '.join(DTYPES)}")
        recipe = recipe_for(quantization, config)
        check_partition(config, peers.rank.count)
        check_stages(config, stage.count)
        if max_loras:
            check_adapters(config)
        decoder: Decoder
        eagle_config = None if eagle is None else read_eagle(eagle, config)
        drafts = None
        if config.through:
            # The library is large, and optional: it is imported where a model needs it.
            from baton.models.fallback.loader import load_fallback

            config, decoder = load_fallback(config, folder, DTYPES[name], load_format)
        else:
            weights = load_weights(
                config,
                folder,
                DTYPES[name],
                "cpu",
                load_format,
                on_progress,
                rank=peers.rank,
                stage=stage,
                recipe=recipe,
            )
            if eagle is not None and eagle_config is not None:
                if kv_dtype == "fp8_static":
                    raise SettingsError(NO_STATIC_SCALES)
                if peers.rank.index == 0:
                    draft_weights = load_eagle(eagle_config, eagle, weights, load_format, pack=True)
                    drafts = EagleDrafts(eagle_config, draft_weights, config.num_layers, most_drafts)
            decoder = DenseDecoder(config, weights, peers, no_tap if drafts is None else drafts.tap, stage)
        kv_format = kv_format_of(kv_dtype, config, folder, DTYPES[name], load_format)
        adapters = CpuAdapterSlots(config, DTYPES[name], max_loras, max_lora_rank, peers, stage)
        return cls(
            config,
            decoder,
            DTYPES[name],
            kv_format,
            peers=peers,
            adapters=adapters,
            eagle=drafts,
            stage=stage,
            draft=eagle_config,
        )

    @property
    def kv_dtype(self) -> torch.dtype:
        """The pool's."""
        return self.kv_format.dtype

    @property
    def num_kv_layers(self) -> int:
        """Of the pool: the model's, and that of a draft."""
        return len(self._layers) + (self._draft is not None)

    def kv_shape(self, num_blocks: int, block_tokens: int) -> tuple[int, int, int, int, int, int]:
        """The pool's shape; its dtype is `kv_dtype`."""
        config = self.config
        layers, planes = self.num_kv_layers, config.kv_planes
        return (num_blocks, config.num_kv_heads, layers, planes, block_tokens, config.head_dim)

    @property
    def _layers(self) -> range:
        """Of the model, those of this stage."""
        return self._stage.layers(self.config.num_layers)

    def bind_pool(self, pool: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """Steps use this pool from now on. Its layers must be contiguous, and zeroed: masks hide numbers, not NaN.

        scales: float32 [num_blocks, kv_heads, layers, 2, block_tokens] in the same memory, where each key and value has
        its own.
        """
        if pool.dim() != 6 or tuple(pool.shape) != self.kv_shape(pool.shape[0], pool.shape[4]):
            raise InvariantBroken(f"pool of shape {list(pool.shape)}, expected {self.kv_shape(pool.shape[0], 0)}")
        if pool.dtype != self.kv_dtype or not _lies_without_gaps(pool, scales):
            raise InvariantBroken(f"pool must be contiguous {self.kv_dtype}, is {pool.dtype}")
        if (scales is not None) != self.kv_format.has_scales_inside:
            raise InvariantBroken("a pool has scales if, and only if, they are made when KV is written")
        kv: PagedKv
        if self.kv_format.quantised:
            static = self.kv_format.static
            own = None if static is None else static[self._layers.start : self._layers.stop]
            kv = QuantisedKv(pool, scales, own, self.dtype)
        else:
            kv = PlainKv(pool)
        draft = None if self._draft is None else attention_of(self._draft)

        def attention(rank: Rank) -> PagedAttention:
            return PagedAttention(self.config, kv, pool.shape[4], self.dtype.itemsize, rank, draft, self._stage)

        self._attention = attention(self._peers.rank)
        if self._eagle is not None:
            self._eagle.bind(attention(WHOLE))  # rank 0 writes all heads of the draft

    def launch(self, rows: Sequence[Row], entering: torch.Tensor | None = None) -> Launched:
        """As models.batch.Runner says; a step without masked draws has ended when this returns. `entering`: what the
        stage before has made of the rows, which then have no drafts."""
        if not rows:
            return Done([])
        if self._eagle is None:
            verified = Verified.of(rows, self.drafter)
        else:
            verified = Verified.proposed(rows, self._eagle.drafts_for)
        self._peers.begin(verified.rows)
        opened = self._open(verified, entering)
        return opened if verified.masked else opened.draw({})

    def advance(self, rows: Sequence[Row], entering: torch.Tensor | None = None) -> torch.Tensor:
        """A step in a stage before the last: what the next one enters with, [N, hidden]."""
        self._peers.begin(rows)
        with torch.inference_mode():
            return self._forward(rows, entering)[1]

    def join(self, begun: Sequence[Row] | FilledSlot) -> None:
        """Compute this rank's part of the step that rank 0 began with these rows, or fill a slot as rank 0 has. Only
        rank 0 draws what is not plain (models.cpu.cut_vocabulary): here any draw that is not does as well."""
        if isinstance(begun, FilledSlot):
            self.adapters.take(begun)
            return
        rows = begun
        if self._stage.is_last:
            self._open(Verified(list(rows), len(rows), {}), None)
            return
        with torch.inference_mode():
            self._forward(rows, None)

    def _open(self, verified: Verified, entering: torch.Tensor | None) -> OpenStep:
        """A step up to its logits, with the tokens that all ranks draw together."""
        rows = verified.rows
        with torch.inference_mode():
            step, hidden = self._forward(rows, entering)
            num_drawn = len(step.drawn_rows)
            share = self._decoder.logits(hidden[:num_drawn], self._adapters_of(step.kept_slots(num_drawn)))
            drawing = [rows[index] for index in step.drawn_rows]
            draws = [row.draw for row in drawing if row.draw is not None]
            tokens = self._vocabulary.draw(share, draws, [_position(row) for row in drawing])
            rest = [place for place in range(num_drawn) if place not in tokens]
            logits = self._vocabulary.whole(share[rest] if tokens else share)

            def head(part: torch.Tensor, row: int) -> torch.Tensor:
                slot = rows[row].adapter
                slots = None if slot is None else np.full(len(part), slot)
                return self._vocabulary.whole(self._decoder.logits(part, self._adapters_of(slots)))

            scored = score_prompts(hidden[num_drawn:], head, step.scored) if step.scored else {}
        drawn = {step.drawn_rows[place]: token for place, token in tokens.items()}
        take_in = None if self._eagle is None else partial(self._eagle.take_in, step, verified)
        return OpenStep(verified, [step.drawn_rows[place] for place in rest], logits, scored, drawn, take_in)

    def _adapters_of(self, slots: np.ndarray | None) -> RowAdapters:
        return NO_ADAPTERS if slots is None else self.adapters.rows(slots)

    def step(self, rows: Sequence[Row]) -> list[Drawn | None]:
        """Computes the rows' tokens and draws what they ask for; one entry a row."""
        return self.launch(rows).read()

    def compute(self, rows: Sequence[Row]) -> tuple[StepBatch, torch.Tensor]:
        """A step up to the logits, float32 [drawn rows, vocab], in the order of the StepBatch's drawn_rows."""
        with torch.inference_mode():
            step, hidden = self._forward(rows, None)
            num_drawn = len(step.drawn_rows)
            logits = self._decoder.logits(hidden[:num_drawn], self._adapters_of(step.kept_slots(num_drawn)))
            return step, self._vocabulary.whole(logits)

    def _forward(self, rows: Sequence[Row], entering: torch.Tensor | None) -> tuple[StepBatch, torch.Tensor]:
        """A step up to what the decoder makes of it."""
        attention = self._attention
        if attention is None:
            raise InvariantBroken("no pool is bound")
        if self.config.rope.kind == "dynamic":
            longest = max(row.start + len(row.token_ids) for row in rows)
            if longest > self.config.max_model_len:
                raise InvariantBroken(
                    f"{longest} tokens; dynamic rope is defined up to {self.config.max_model_len} only"
                )
        step = lay_out(rows, attention.shape, self.config.sliding_window, self.dtype)
        if not self._stage.is_first:
            step = replace(step, entering=self._shared(entering, len(step.token_ids)))
        return step, self._decoder(attention, step, self._adapters_of(step.adapter_slots))

    def _shared(self, entering: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
        """What the step enters this stage with, which rank 0 was given: the others add nothing to it."""
        if self._peers.rank.index:
            entering = torch.zeros(num_tokens, self.config.hidden_size, dtype=self.dtype)
        if entering is None or len(entering) != num_tokens:
            raise InvariantBroken(f"{num_tokens} tokens enter a stage with {0 if entering is None else len(entering)}")
        return self._peers.sum(entering)


def _lies_without_gaps(pool: torch.Tensor, scales: torch.Tensor | None) -> bool:
    """Whether heads, and behind their scales layers, follow each other as the layout of KV says."""
    if scales is None:
        return pool.is_contiguous()
    _, kv_heads, layers, _, block_tokens, head_dim = pool.shape
    layer, plane = pool.stride(2), block_tokens * head_dim
    follows = pool.stride() == (kv_heads * layers * layer, layers * layer, layer, plane, head_dim, 1)
    has_room = layer >= 2 * plane + 2 * block_tokens * scales.element_size()
    return follows and has_room and scales.dtype == torch.float32 and scales.shape == pool.shape[:5]


def _position(row: Row) -> int:
    """Of the token that the row draws."""
    return row.start + len(row.token_ids)


class OpenStep:
    """A step up to its logits, float32 [undrawn rows, vocab], of those rows whose tokens are not drawn yet."""

    device_time = None

    def __init__(
        self,
        verified: Verified,
        undrawn_rows: Sequence[int],
        logits: torch.Tensor,
        prompt_logprobs: Mapping[int, tuple[PromptLogprob, ...]],
        tokens: Mapping[int, int],
        take_in: Callable[[list[Drawn | None]], None] | None = None,
    ) -> None:
        """tokens: drawn already, by row. take_in: called with what the given rows have drawn."""
        self.prompt_logprobs = prompt_logprobs
        self._verified, self._rows = verified, verified.rows
        self._undrawn_rows, self._tokens, self._take_in = undrawn_rows, tokens, take_in
        self._logits = logits
        self._ended: Done | None = None

    @property
    def masked_drafts(self) -> Sequence[Sequence[int]]:
        own = [drafted for _, *drafted in self._verified.masked]
        return [[self._rows[index].token_ids[0] for index in drafted] for drafted in own]

    def complete(self, masks: np.ndarray) -> None:
        masked = [index for own in self._verified.masked for index in own]
        self._ended = self.draw(dict(zip(masked, masks, strict=True)))

    def read(self) -> list[Drawn | None]:
        if self._ended is None:
            raise InvariantBroken("a step with masked draws was not completed")
        return self._ended.read()

    def draw(self, masks: Mapping[int, np.ndarray]) -> Done:
        """The step with its tokens; masks: of the masked rows."""
        result: list[Drawn | None] = [None] * len(self._rows)
        for index, token in self._tokens.items():
            result[index] = Drawn((token,))
        drawing = [self._rows[index] for index in self._undrawn_rows]
        draws = [row.draw for row in drawing if row.draw is not None]
        positions = [_position(row) for row in drawing]
        with torch.inference_mode():
            ordered = [masks[index] for index in self._undrawn_rows if index in masks]
            drawn = draw_tokens(self._logits, draws, positions, ordered) if draws else []
        for index, entry in zip(self._undrawn_rows, drawn, strict=True):
            result[index] = entry
        accepted = self._verified.accept(result)
        if self._take_in is not None:
            with torch.inference_mode():
                self._take_in(accepted)
        return Done(accepted, prompt_logprobs=self.prompt_logprobs)
