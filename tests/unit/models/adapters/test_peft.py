"""Random adapters of PEFT, read from their folders and run on the CPU, against PEFT itself."""

from __future__ import annotations

import copy
import json
from itertools import product

import peft
import pytest
import torch
from safetensors.torch import save_file

from baton.models.adapters.base_rows import rows_of_folder
from baton.models.adapters.peft import read_adapter
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.node.messages.control import SamplingSpec
from baton.testing.rank_threads import RankThreads
from baton.tests.unit.models.adapters.conftest import MadeAdapter
from baton.tests.unit.models.conftest import LATENT
from baton.tests.unit.models.cpu.test_stages import Pipeline

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore:The following .*_pattern keys"
)
GREEDY = Draw(SamplingSpec(max_tokens=1000, temperature=0.0), (), 0, 0)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = "all-linear"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GATE = "mlp.gate.weight"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ADAPTERS = {
    "all linear modules": ("llama", {}, {"target_modules": ALL, "r": 8}),
    "rank 1 in two modules": ("llama", {}, {"target_modules": ["q_proj", "v_proj"], "r": 1}),
    "rsLoRA, biased": ("qwen2", {}, {"target_modules": ALL, "use_rslora": True, "r": 16}),
    "patterns": (
        "qwen3",
        {},
        {
            "target_modules": ALL,
            "rank_pattern": {"k_proj": 2, r"model.layers.1.mlp.*": 5},
            "alpha_pattern": {"v_proj": 1, "^model.layers.2.self_attn.o_proj": 20},
        },
    ),
    "some layers by a regex": ("llama", {}, {"target_modules": r".*\.(gate|down)_proj", "layers_to_transform": None}),
    "one layer": ("llama", {}, {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "embedding and head": ("llama", {}, {"target_modules": ["embed_tokens", "lm_head", "up_proj"]}),
    "embedding of a tied model, scaled": ("gemma", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}),
    "head behind a softcap": ("gemma2", {"tie_word_embeddings": False}, {"target_modules": ["lm_head", "q_proj"]}),
    "own embedding and head": (
        "llama",
        {},
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "own norms, embedding": (
        "qwen2",
        {},
        {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm", "norm", "embed_tokens"]},
    ),
    "own head of a tied model, behind a softcap": (
        "gemma2",
        {"tie_word_embeddings": True},
        {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"]},
    ),
    "own embedding of a tied model, scaled": (
        "gemma",
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "rows of tokens": (
        "llama",
        {},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [90, 3], "lm_head": [5, 130, 9]}},
    ),
    "rows of tokens of a tied model, scaled": (
        "gemma",
        {"tie_word_embeddings": True},
        {"target_modules": ["v_proj"], "trainable_token_indices": list(range(1, 131, 9))},
    ),
    "rows of tokens beside an own head": (
        "qwen2",
        {},
        {"target_modules": ["v_proj"], "trainable_token_indices": [3], "modules_to_save": ["lm_head"]},
    ),
    "merged projections": ("phi3", {"pad_token_id": 0}, {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "magnitudes (DoRA)": ("llama", {}, {"target_modules": [*ATTENTION, "gate_proj", "lm_head"], "use_dora": True}),
    "magnitudes of merged projections": (
        "phi3",
        {"pad_token_id": 0},
        {"target_modules": ["qkv_proj"], "use_dora": True},
    ),
    "magnitudes (DoRA) beside biases": ("qwen2", {}, {"target_modules": ALL, "use_dora": True, "use_rslora": True}),
    "magnitudes (DoRA) beside biases of what ranks sum": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
        {"target_modules": ATTENTION, "use_dora": True},
    ),
    "attention beside experts": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"target_modules": ATTENTION},
    ),
    "shared experts, a dense layer": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
        {"target_modules": ALL, "exclude_modules": ["shared_expert_gate"], "r": 8},
    ),
    "attention with norms of heads, experts": ("qwen3_moe", EXPERTS, {"target_modules": ATTENTION}),
    "attention with norms of rows, experts": ("olmoe", EXPERTS | {"head_dim": 12}, {"target_modules": ATTENTION}),
    "attention with sinks and biases, experts": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
        {"target_modules": ATTENTION},
    ),
    "experts as parameters": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"target_parameters": BOTH},
    ),
    "experts as parameters, norms of heads": ("qwen3_moe", EXPERTS, {"target_parameters": BOTH}),
    "experts as parameters, gated shared ones, a dense layer": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
        {"target_modules": ALL, "exclude_modules": ["shared_expert_gate"], "target_parameters": BOTH},
    ),
    "gates of experts, scaled by patterns": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
        {
            "target_parameters": BOTH[:1],
            "rank_pattern": {r".*\.gate_up_proj": 7},
            "alpha_pattern": {r".*\.gate_up_proj": 3},
        },
    ),
    "routers, experts and attention, all linear": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"target_modules": ALL, "r": 3},
    ),
    "routers, rsLoRA": ("qwen3_moe", EXPERTS, {"target_parameters": [GATE], "use_rslora": True}),
    "routers of Mixtral as modules": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"target_modules": ["gate", "v_proj"], "r": 6},
    ),
    "routers by patterns, gates of shared experts, all linear": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
        {
            "target_modules": ALL,
            "target_parameters": [GATE],
            "rank_pattern": {r"1.mlp.gate.weight": 2, r"2.mlp.gate": 9, "mlp.shared_expert_gate": 3},
            "alpha_pattern": {"2.mlp.gate.weight": 3, r".*\.gate": 50, "shared_expert_gate": 9},
        },
    ),
    "magnitudes (DoRA) of gates of shared experts": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 40},
        {"target_modules": ["shared_expert_gate", "o_proj"], "use_dora": True},
    ),
    "routers with biases, a weight of attention": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
        {"target_parameters": ["router.weight", "1.self_attn.o_proj.weight"], "rank_pattern": {"o_proj.weight": 7}},
    ),
    "routers with corrections, by groups": (
        "deepseek_v3",
        LATENT | {"head_dim": 16},
        {"target_parameters": [GATE, *BOTH], "r": 2},
    ),
    "routers by groups": ("deepseek_v2", LATENT, {"target_modules": ["gate", "o_proj"]}),
    "experts of one layer beside all attention": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
        {"target_modules": ALL, "target_parameters": [f"1.{parameter}" for parameter in BOTH]},
    ),
    "experts behind a dense layer, beside a shared one": (
        "deepseek_v3",
        LATENT | {"head_dim": 16},
        {"target_modules": ["o_proj"], "target_parameters": BOTH, "r": 2},
    ),
    "latent attention, magnitudes (DoRA)": (
        "deepseek_v2",
        LATENT | {"q_lora_rank": None},
        {"target_modules": ["q_proj", "kv_a_proj_with_mqa", "o_proj"], "use_dora": True},
    ),
    "keys and values of latents, magnitudes (DoRA)": (
        "deepseek_v2",
        LATENT | {"q_lora_rank": None},
        {"target_modules": ["kv_b_proj", "o_proj"], "use_dora": True},
    ),
    "latent attention, experts and routers, all linear": (
        "deepseek_v3",
        LATENT | {"head_dim": 16},
        {"target_modules": ALL, "rank_pattern": {"kv_b_proj": 3}},
    ),
    "latent attention, queries with a latent": (
        "deepseek_v3",
        LATENT | {"head_dim": 16},
        {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]},
    ),
}


STAGES = [
    ("embedding and head", 1),
    ("own norms, embedding", 2),
    ("rows of tokens of a tied model, scaled", 1),
    ("routers by patterns, gates of shared experts, all linear", 1),
]
"""With so many ranks each."""


class Slots:
    """Rows of a runner with a slot for each adapter, each sequence over blocks of its own."""

    def __init__(self, folder, adapters, sequences, num_sequences, **options):
        self.runner = ModelRunner.load(folder, max_loras=max(1, len(adapters)), max_lora_rank=16, **options)
        self.tables = sequences(self.runner, num_sequences, 128).tables
        base_rows = rows_of_folder(folder, self.runner.config.tie_word_embeddings)
        for slot, adapter in enumerate(adapters):
            read = read_adapter(adapter.folder, self.runner.config, base_rows)
            assert self.runner.adapters.fill(slot, self.runner.adapters.prepare(read)).done

    def prompt_row(self, index, tokens, slot, first=0, draws=True):
        return Row(tokens, first, self.tables[index], GREEDY if draws else None, adapter=slot)

    def greedy(self, index, prompt, count, slot):
        """Tokens and the logits that they were drawn from; the prompt in chunks."""
        known, logits = list(prompt), []
        self.runner.step([self.prompt_row(index, prompt[:20], slot, draws=False)])
        row = self.prompt_row(index, prompt[20:], slot, 20)
        for _ in range(count):
            logits.append(self.runner.compute([row])[1][0])
            known.append(int(logits[-1].argmax()))
            row = self.prompt_row(index, known[-1:], slot, len(known) - 1)
        return known[len(prompt) :], torch.stack(logits)


def logits_of(model, tokens, count):
    """Of PEFT, behind each of the last `count` + 1 tokens but the last."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -count - 1 : -1]


def assert_close(ours, theirs, tolerance=1e-4):
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= tolerance


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_and_tokens_equal_peft_unmerged_and_merged(name, make_model, make_adapter, sequences, prompt):
    """Guards against any difference in an adapter: a scaling, a part in the rows of another, a module left out."""
    family, variant, options = ADAPTERS[name]
    made = make_model(family, **variant)
    adapter = make_adapter(made.reference, **options)
    ours, logits = Slots(made.folder, [adapter], sequences, 1).greedy(0, prompt, 12, 0)
    tokens = prompt + ours
    theirs = logits_of(adapter.model, tokens, 12)
    assert_close(logits, theirs)
    assert theirs.argmax(-1).tolist() == ours
    if not made.reference.config.tie_word_embeddings:  # merged, a tied head would change with the embedding
        assert_close(logits, logits_of(adapter.merged(), tokens, 12), 5e-4)
    assert (theirs - logits_of(made.reference, tokens, 12)).abs().max() > 0.1, "the adapter changes nothing"


def test_rows_of_one_step_have_their_own_adapters(make_model, make_adapter, sequences, prompt):
    """Guards against an adapter's numbers in the row of another, or of the base: chunks and decode rows in one step."""
    made = make_model("llama")
    kinds = [{"target_modules": ALL, "r": 1 + 3 * seed, "seed": seed} for seed in range(4)]
    adapters = [make_adapter(made.reference, f"a{number}", **kind) for number, kind in enumerate(kinds)]
    slots = Slots(made.folder, adapters, sequences, 10)
    alone = Slots(made.folder, [], sequences, 10)
    named = [0, None, 3, 1, None, 2, 0, None, 1, 3]
    prompts = [prompt[index:] for index in range(10)]
    first = [slots.prompt_row(index, prompts[index], named[index]) for index in range(6)]
    drawn = [list(entry.token_ids) for entry in slots.runner.step(first)]
    decode = [slots.prompt_row(index, drawn[index], named[index], len(prompts[index])) for index in range(6)]
    rows = [*decode, *(slots.prompt_row(index, prompts[index], named[index]) for index in range(6, 10))]
    step, logits = slots.runner.compute(rows)
    for number, index in enumerate(step.drawn_rows):
        tokens = prompts[index] + (drawn[index] if index < 6 else [])
        model = made.reference if named[index] is None else adapters[named[index]].model
        assert_close(logits[number], logits_of(model, [*tokens, 0], 1)[0])
    alone.runner.step([row._replace(adapter=None) for row in first])
    base = alone.runner.compute([row._replace(adapter=None) for row in rows])[1]
    for number, index in enumerate(step.drawn_rows):
        if named[index] is None:
            assert torch.equal(logits[number], base[number]), "rows of the base must not see adapters beside them"


def test_log_probabilities_of_a_prompt_are_those_of_its_adapter(make_model, make_adapter, sequences, prompt):
    """Guards against a head without its adapter where many tokens of a row are scored."""
    from baton.models.batch import PromptTargets

    made = make_model("llama")
    adapter = make_adapter(made.reference, target_modules=["lm_head", "v_proj"])
    slots = Slots(made.folder, [adapter], sequences, 2)
    rows = [slots.prompt_row(number, prompt, slot) for number, slot in enumerate((0, None))]
    launched = slots.runner.launch([row._replace(targets=PromptTargets(0, prompt[1:], 0)) for row in rows])
    for number, model in enumerate((adapter.model, made.reference)):
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        expected = theirs[range(len(prompt) - 1), prompt[1:]]
        ours = torch.tensor([entry.logprob for entry in launched.prompt_logprobs[number]])
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_a_quantised_model_takes_adapters(make_model, make_adapter, sequences, prompt):
    """What an adapter adds is not quantised: the answer is as far from the exact one as the model's own."""
    made = make_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    adapter = make_adapter(made.reference, target_modules=ALL)
    logits = {}
    for slot in (0, None):
        slots = Slots(made.folder, [adapter], sequences, 1, quantization="int8")
        logits[slot] = slots.greedy(0, prompt, 1, slot)[1]
    exact = {slot: logits_of(model, [*prompt, 0], 1) for slot, model in ((0, adapter.model), (None, made.reference))}
    error = {slot: float((logits[slot] - exact[slot]).norm() / exact[slot].norm()) for slot in exact}
    assert 0 < error[None] < 0.1 and error[0] < 2 * error[None], error


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("all linear modules", 4),
        ("rsLoRA, biased", 2),
        ("embedding and head", 2),
        ("own embedding and head", 2),
        ("rows of tokens", 2),
        ("own norms, embedding", 2),
        ("merged projections", 2),
        ("magnitudes (DoRA)", 2),
        ("magnitudes (DoRA) beside biases of what ranks sum", 2),
        ("attention beside experts", 2),
        ("shared experts, a dense layer", 2),
        ("latent attention, magnitudes (DoRA)", 2),
        ("latent attention, queries with a latent", 4),
        ("keys and values of latents, magnitudes (DoRA)", 2),
        ("latent attention, experts and routers, all linear", 4),
        ("experts behind a dense layer, beside a shared one", 2),
        ("routers, experts and attention, all linear", 2),
        ("routers by patterns, gates of shared experts, all linear", 2),
    ],
)
def test_tokens_of_ranks_equal_peft(name, count, make_model, make_adapter, sequences, prompt):
    """Guards against a part of an adapter that two ranks add, or none; and against slots that only rank 0 fills."""
    family, variant, options = ADAPTERS[name]
    made = make_model(family, **variant)
    adapter = make_adapter(made.reference, **options)

    def load(peers):
        return ModelRunner.load(made.folder, max_loras=2, max_lora_rank=16, peers=peers)

    group = RankThreads(load, count)
    tables = sequences(group.runners[0], 2, 128).tables
    group.bind_pool(torch.zeros(group.runners[0].kv_shape(sum(map(len, tables)), 16)))
    base_rows = rows_of_folder(made.folder, made.reference.config.tie_word_embeddings)
    group.fill(1, read_adapter(adapter.folder, group.config, base_rows))
    known = [list(prompt), list(prompt)]
    for step in range(8):
        news = known if step == 0 else [tokens[-1:] for tokens in known]
        rows = [
            Row(new, len(tokens) - len(new), table, GREEDY, adapter=slot)
            for new, tokens, table, slot in zip(news, known, tables, (1, None), strict=True)
        ]
        for tokens, drawn in zip(known, group.step(rows), strict=True):
            tokens += drawn.token_ids
    for tokens, model in zip(known, (adapter.model, made.reference), strict=True):
        assert logits_of(model, tokens, 8).argmax(-1).tolist() == tokens[len(prompt) :]
    assert known[0] != known[1]


@pytest.mark.parametrize(("name", "ranks"), STAGES)
def test_tokens_of_stages_equal_peft(name, ranks, make_model, make_adapter, prompt):
    """Guards against layers, norms, routers, embeddings and heads of another stage."""
    family, variant, options = ADAPTERS[name]
    made = make_model(family, **variant)
    adapter = make_adapter(made.reference, **options)
    pipeline = Pipeline(made.folder, 2, ranks, max_loras=1, max_lora_rank=16)
    pipeline.bind_pools()
    base_rows = rows_of_folder(made.folder, made.reference.config.tie_word_embeddings)
    read = read_adapter(adapter.folder, ModelConfig.from_folder(made.folder), base_rows)
    for stage in pipeline.stages:
        if isinstance(stage, RankThreads):
            stage.fill(0, read)
        else:
            stage.adapters.fill(0, stage.adapters.prepare(read))
    known = list(prompt)
    for _ in range(6):
        new = known[-1:] if len(known) > len(prompt) else known
        row = Row(new, len(known) - len(new), list(range(6)), GREEDY, adapter=0)
        known += pipeline.launch([row]).read()[0].token_ids
    assert logits_of(adapter.model, known, 6).argmax(-1).tolist() == known[len(prompt) :]


@pytest.mark.parametrize(
    ("family", "variant", "block", "width", "names"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "block_sparse_moe", 80, ("w1", "w3", "w2")),
        ("qwen3_moe", EXPERTS, "mlp", 24, ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_pairs_of_single_experts_equal_what_peft_makes_of_them(
    family, variant, block, width, names, make_model, sequences, prompt, tmp_path
):
    """Folders from before transformers 5 name each expert's projections, and the router. Guards against a pair at
    another expert, and against tokens with experts, or the router, of the adapter of a row beside them."""
    made = make_model(family, **variant)
    gate, up, down = names
    expected = []
    for seed in (1, 2):
        folder, generator = tmp_path / f"old{seed}", torch.Generator().manual_seed(seed)
        folder.mkdir()
        tensors = {}
        for layer, expert, (name, outputs, inputs) in product(
            range(3), range(4), ((gate, width, 48), (up, width, 48), (down, 48, width))
        ):
            module = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}."
            tensors[f"{module}lora_A.weight"] = torch.randn(4, inputs, generator=generator) * 0.15
            tensors[f"{module}lora_B.weight"] = torch.randn(outputs, 4, generator=generator) * 0.15
        for layer, (side, shape) in product(range(3), (("A", (4, 48)), ("B", (4, 4)))):
            router = f"base_model.model.model.layers.{layer}.{block}.gate.lora_{side}.weight"
            tensors[router] = torch.randn(shape, generator=generator) * 0.5
        save_file(tensors, folder / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": [*names, "gate"]}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        model = peft.PeftModel.from_pretrained(copy.deepcopy(made.reference), folder).eval()
        expected.append(MadeAdapter(folder, model))
    slots = Slots(made.folder, expected, sequences, 3)
    models = {0: expected[0].model, 1: expected[1].model, None: made.reference}
    known = [list(prompt) for _ in models]
    for step in range(6):
        news = known if step == 0 else [tokens[-1:] for tokens in known]
        rows = [
            slots.prompt_row(index, new, slot, len(tokens) - len(new))
            for index, (new, slot, tokens) in enumerate(zip(news, models, known, strict=True))
        ]
        for tokens, row in zip(known, slots.runner.compute(rows)[1], strict=True):
            tokens.append(int(row.argmax()))
    for tokens, model in zip(known, models.values(), strict=True):
        assert logits_of(model, tokens, 6).argmax(-1).tolist() == tokens[len(prompt) :]
    assert len({tuple(tokens) for tokens in known}) == 3, "an adapter changes nothing"


@pytest.mark.parametrize(
    ("family", "variant"),
    [("llama", {}), ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4})],
    ids=["dense", "all experts"],
)
def test_bfloat16_is_close(family, variant, make_model, make_adapter, sequences, prompt):
    """A router is float32, and its pair is not. All experts are chosen: rounding must not choose others."""
    made = make_model(family, **variant)
    adapter = make_adapter(made.reference, target_modules=ALL)
    _, logits = Slots(made.folder, [adapter], sequences, 1, dtype="bfloat16").greedy(0, prompt, 1, 0)
    exact = logits_of(adapter.model, [*prompt, 0], 1)
    theirs = logits_of(adapter.model.to(torch.bfloat16), [*prompt, 0], 1).float()
    assert float((logits - exact).norm()) <= 3 * float((theirs - exact).norm())
