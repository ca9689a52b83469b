"""Train the demo model in models/demo: a Llama of 7 million parameters that writes short stories and ends them.

    python scripts/train_demo_model.py --corpus FOLDER --out models/demo

FOLDER holds `children.txt.xz` (public domain books, `<|book|>` between them) and `tinystories_sample.txt` (stories,
`<|endoftext|>` between them; CDLA-Sharing-1.0). Needs torch, transformers, tokenizers, safetensors; minutes on one GPU.
`--steps 0` writes random weights on a CPU in one minute; `--tokenizer FILE` keeps a tokenizer that was trained before.
Nothing in the served system imports this file.
"""

import argparse
import json
import lzma
import math
import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END_OF_TEXT, END, USER, ASSISTANT, SYSTEM = SPECIALS = [
    "<|endoftext|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
]
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
"""Tokens around reasoning, calls and their results. No text that the model was trained on has them."""
CHAT_TEMPLATE = (
    "{%- set roles = {'assistant': 'assistant', 'system': 'system', 'developer': 'system'} %}"
    "{%- set has_system = messages and roles[messages[0]['role']] == 'system' %}"
    "{%- if tools %}"
    "{{- '<|system|>\\n' }}"
    "{%- if has_system %}{{- messages[0]['content'] | trim + '\\n\\n' }}{%- endif %}"
    "{{- 'You can call these functions:\\n<tools>\\n' }}"
    "{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}"
    "{{- '</tools>\\nA call has the name of the function and its arguments:\\n<tool_call>\\n' }}"
    '{{- \'{"name": "NAME", "arguments": {"PARAMETER": "VALUE"}}\\n</tool_call><|end|>\\n\' }}'
    "{%- endif %}"
    "{%- set turn = namespace(question=-1) %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set turn.question = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if not (tools and has_system and loop.first) %}"
    "{%- set role = roles[message['role']] | default('user') %}"
    "{{- '<|' + role + '|>\\n' }}"
    "{%- if role == 'assistant' and message['reasoning_content'] and loop.index0 > turn.question %}"
    "{{- '<think>\\n' + message['reasoning_content'] | trim + '\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- set text = message['content'] | default('', true) | trim %}"
    "{{- '<tool_response>\\n' + text + '\\n</tool_response>' if message['role'] == 'tool' else text }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{%- set made = call['function']['arguments'] %}"
    "{{- '\\n' if text or not loop.first }}"
    "{{- '<tool_call>\\n{\"name\": ' + call['function']['name'] | tojson + ', \"arguments\": ' }}"
    "{{- (made if made is string else made | tojson) + '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|assistant|>\\n' }}"
    "{%- if enable_thinking is defined %}"
    "{{- '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)
"""Reasoning of earlier turns is kept until the user's next message. `enable_thinking` begins an answer inside reasoning
or, where it is false, behind an empty one; without it, a prompt says nothing of reasoning."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": [1, 0],
    "torch_dtype": "bfloat16",
}


# --- text -------------------------------------------------------------------------------------------------------------

HELD_OUT_BOOKS = {"A Kidnapped Santa Claus", "Christmas Stories"}
HELD_OUT_STORIES = 100
# Old books carry old slurs: a passage with one of these is dropped.
UNWANTED = re.compile(
    r"nigg|negro|dark(?:y|ies)\b|squaw|redskin|half-breed|chinam|\bjews?\b|gutenberg|illustration|footnote|http|www\.",
    re.I,
)
TYPOGRAPHY = str.maketrans(
    {"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "–": "-", "—": " - ", "…": "...", "`": "'", "_": "", "*": ""}
)


def plain(text: str) -> str:
    """One line of plain ASCII: no markdown, no odd typography."""
    text = text.translate(TYPOGRAPHY).replace("--", " - ")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"\.\s\.\s\.(\s\.)?", "...", text)
    text = re.sub(r"\[[^\]]*\]", "", text)
    return re.sub(r"\s+", " ", text).strip()


def chapters(book: str) -> Iterator[list[str]]:
    """The paragraphs of each chapter; headings, verse, tables and letterheads are left out."""
    body = book.split("-------", 1)[-1]
    for chapter in re.split(r"\n#+ [^\n]*\n", body):
        raw = [block.strip() for block in re.split(r"\n\s*\n", chapter)]
        paragraphs = [
            plain(block)
            for block in raw
            if "\n" not in block and "|" not in block and not block.startswith(("#", ">", "-"))
        ]
        yield [p for p in paragraphs if len(p) > 3 and not p.isupper() and not UNWANTED.search(p) and p[-1] in ".!?\"'"]


def passages(paragraphs: list[str], draw: random.Random) -> Iterator[str]:
    """Cuts a chapter at paragraph ends into passages of 40 to 1,000 words, of which most are short."""
    start = 0
    while start < len(paragraphs):
        wanted, words, stop = math.exp(draw.uniform(math.log(40), math.log(1000))), 0, start
        while stop < len(paragraphs) and words < wanted:
            words += len(paragraphs[stop].split())
            stop += 1
        if words >= 30:
            yield "\n".join(paragraphs[start:stop])
        start = stop


def read_books(folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Chapters (lists of paragraphs) to train on, and chapters of the held-out books."""
    train, held_out = [], []
    with lzma.open(folder / "children.txt.xz", "rt", encoding="utf-8") as file:
        books = file.read().split("<|book|>")
    for book in books:
        title = re.search(r"# Title: (.*)", book)
        held = title is not None and title.group(1).strip() in HELD_OUT_BOOKS
        (held_out if held else train).extend(chapters(book))
    return train, held_out


def read_stories(folder: Path) -> tuple[list[str], list[str]]:
    stories = []
    for story in (folder / "tinystories_sample.txt").read_text(encoding="utf-8").split(END_OF_TEXT):
        text = "\n".join(filter(None, map(plain, story.split("\n"))))
        if len(text) > 150 and (text[0].isupper() or text[0] == '"') and text[-1] in '.!?"':
            stories.append(text)
    stories = sorted(set(stories))
    random.Random(0).shuffle(stories)
    return stories[HELD_OUT_STORIES:], stories[:HELD_OUT_STORIES]


GIRLS = """
    Lily Lucy Mia Anna Sara Sue Jane Amy Emma Daisy Molly Jill Ella Mary Lila Sally Lola Kate Bella Zoe
    Nina Ruby Alice Clara Rosie Nora
""".split()  # noqa: SIM905
BOYS = """
    Tim Tom Ben Max Sam Jack Bob John Billy Timmy Tommy Joe Mark Leo Jim Peter David Johnny Fred Charlie
    Toby Henry Oscar Paul Dan Adam
""".split()  # noqa: SIM905


def rename(story: str, draw: random.Random) -> str:
    """The same story with other first names: cheap augmentation against memorising 1,800 stories."""
    used = set(re.findall(r"\b[A-Z][a-z]+\b", story))
    names = {}
    for group in (GIRLS, BOYS):
        old = [name for name in group if name in used]
        names |= dict(
            zip(old, draw.sample([name for name in group if name not in used], min(len(old), 8)), strict=False)
        )
    return re.sub(r"\b[A-Z][a-z]+\b", lambda match: names.get(match.group(), match.group()), story)


# --- conversations ----------------------------------------------------------------------------------------------------

REQUESTS = [
    "Tell me a story about {}.",
    "Tell me a short story about {}.",
    "Write a story about {}.",
    "Write a short story about {}",
    "Please tell me a story about {}.",
    "Can you tell me a story about {}?",
    "tell me a story about {}",
    "I would like to hear a story about {}.",
    "Tell me a bedtime story about {}.",
    "A story about {}, please.",
]
OLD_REQUESTS = [
    "Read me a page of an old book about {}.",
    "Tell me something from an old book about {}.",
    "Write a passage in the old style about {}.",
]
CONTINUE = [
    "Continue this story: {}",
    "Go on with this story:\n{}",
    "How does this story go on? {}",
    "Finish the story. {}",
]
ANY_STORY = [
    "Tell me a story.",
    "Tell me a story",
    "Write a short story.",
    "Please tell me a bedtime story.",
    "Can you tell me a story?",
]
ANOTHER = [
    "Tell me another story.",
    "Another one, please.",
    "One more!",
    "Now tell me a different story.",
    "Thank you. Tell me one more story.",
]
SYSTEMS = ["You are a friendly storyteller.", "You tell short stories for children.", "You are a helpful assistant."]
WHO = "I am the little demo model of Baton. I have read children's books, and I like to tell stories."
OFFER = "What should the story be about?"
# Answers, and the questions that they answer, a line for each.
SMALL_TALK = {
    f"Hello! I can tell you a story. {OFFER}": """
        Hello
        Hello!
        Hi
        Hi!
        Hey
        Hi there!
        Good morning!
        Good evening.
        Hello there.
    """,
    f"{WHO} {OFFER}": """
        Who are you?
        What are you?
        What is your name?
        Tell me about yourself.
        Are you a robot?
        Hi, who are you?
    """,
    "I can tell you a little story. Just tell me what it should be about, such as a fox and a river.": """
        What can you do?
        Can you help me?
        Help
        How do I use this?
        What should I ask you?
        What do you know?
    """,
    "I am well, thank you! Shall I tell you a story?": """
        How are you?
        How are you today?
        How do you do?
        Hello, how are you?
    """,
    "You are welcome! Come back when you want another story.": """
        Thank you!
        Thanks
        Thank you very much.
        That was a nice story.
    """,
    "Goodbye! Sleep well.": """
        Goodbye
        Bye!
        Good night.
        See you tomorrow.
    """,
    "I am only a small model, and I do not know that. But I can tell you a story! What should it be about?": """
        What is 12 times 7?
        Write a program that sorts a list.
        What is the capital of France?
        Who is the president?
        Solve this equation.
        Translate this into German.
        Explain quantum physics.
        What is the weather today?
        Write a Python function.
        How many people live in China?
        What is the meaning of life?
        Explain how a computer works.
        Write an email to my boss.
        What is machine learning?
        How much is 3 + 4?
    """,
}


NO_SUBJECTS = set(
    """
    time lot own best same big idea way head end while sudden dark other side top day moment life one
    hand word first rest
    """.split()  # noqa: SIM905
)


def find_nouns(texts: list[str]) -> dict[str, str]:
    """Words that stand between an article and a full stop often enough to be nouns, each with its article."""
    text = " ".join(texts).lower()
    words, closed = (
        Counter(re.findall(r"[a-z]+", text)),
        Counter(re.findall(r"\b(?:the|a|an|her|his) ([a-z]{3,12})[.,!?]", text)),
    )
    articles = Counter(re.findall(r"\b(an? [a-z]+)", text))
    nouns = {}
    for word, count in closed.items():
        if count >= 3 and count > 0.08 * words[word] and word not in NO_SUBJECTS:
            a, an = articles[f"a {word}"], articles[f"an {word}"]
            article = ("an " if an > a else "a ") if a + an > 1 else ("" if word.endswith("s") else "the ")
            nouns[word] = article + word
    return nouns


def subject(text: str, nouns: dict[str, str], draw: random.Random) -> str | None:
    """What a text is about, such as "Lily and a dog": its frequent nouns and its first name."""
    counts = Counter(word for word in re.findall(r"[a-z]+", text) if word in nouns)
    chosen = [nouns[word] for word, _ in counts.most_common(5)]
    draw.shuffle(chosen)
    names = [name for name in re.findall(r"\b[A-Z][a-z]+\b", text) if name in GIRLS or name in BOYS]
    chosen = (names[:1] if names and draw.random() < 0.3 else []) + chosen[: draw.choice([1, 1, 2, 2, 3])]
    if not chosen:
        return None
    return " and ".join(filter(None, [", ".join(chosen[:-1]), chosen[-1]]))


def ask(text: str, nouns: dict[str, str], requests: list[str], draw: random.Random) -> tuple[str, str]:
    """A user's turn made from a text, and the assistant's turn that answers it."""
    kind = draw.random()
    sentence = re.match(r"(.{20,200}?[.!?]\"?)\s", text, re.S)
    if kind < 0.2 and sentence and len(text) > 2 * sentence.end():
        return draw.choice(CONTINUE).format(sentence.group(1)), text[sentence.end() :].strip()
    about = subject(text, nouns, draw)
    if about is None or (kind > 0.92 and requests is REQUESTS):
        return draw.choice(ANY_STORY if requests is REQUESTS else CONTINUE[:1]).format(""), text
    return draw.choice(requests).format(about), text


def chat(turns: list[tuple[str, str]], draw: random.Random) -> list[tuple[str, bool]]:
    """Pieces (text, is learnt) in the form of CHAT_TEMPLATE; only the assistant's turns are learnt."""
    pieces = [(f"{SYSTEM}\n{draw.choice(SYSTEMS)}{END}\n", False)] if draw.random() < 0.15 else []
    for position, (question, answer) in enumerate(turns):
        pieces.append((f"{'' if position == 0 else chr(10)}{USER}\n{question}{END}\n{ASSISTANT}\n", False))
        pieces.append((f"{answer}{END}", True))
    return pieces


def small_talk(draw: random.Random) -> tuple[str, str]:
    answer = draw.choice(list(SMALL_TALK))
    return draw.choice(SMALL_TALK[answer].strip().split("\n")).strip(), answer


def story_chat(story: str, stories: list[str], nouns: dict[str, str], draw: random.Random) -> list[tuple[str, bool]]:
    turns = [ask(story, nouns, REQUESTS, draw)]
    if draw.random() < 0.08:
        turns.insert(0, small_talk(draw))
    if draw.random() < 0.12:
        another = rename(draw.choice(stories), draw)
        turns.append((draw.choice(ANOTHER), another) if draw.random() < 0.5 else ask(another, nouns, REQUESTS, draw))
    if draw.random() < 0.05:
        turns.append(small_talk(draw))
    return chat(turns, draw)


def document(text: str, draw: random.Random) -> list[tuple[str, bool]]:
    """A plain text; some begin with the previous text's end token, so that a prompt of only that token works too."""
    return [((END_OF_TEXT if draw.random() < 0.3 else "") + text + END_OF_TEXT, True)]


# --- tokens -----------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_markers(tokenizer)


def with_markers(tokenizer: Tokenizer) -> Tokenizer:
    """MARKERS in the places of bytes that no UTF-8 text has: no other token changes, and the vocabulary stays full."""
    content = json.loads(tokenizer.to_str())
    vocab, added = content["model"]["vocab"], content["added_tokens"]
    known = {entry["content"] for entry in added}
    for byte, marker in enumerate(MARKERS, start=0xF5):  # UTF-8 ends at 0xF4
        if marker not in known:
            vocab[marker] = token_id = vocab.pop(chr(byte))  # bytes of Latin letters stand for themselves
            added.append({**added[0], "id": token_id, "content": marker, "special": False})
    content["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
    return Tokenizer.from_str(json.dumps(content))


@dataclass(frozen=True, slots=True)
class Pool:
    """Documents of one kind, end to end: `ids[starts[i]:starts[i + 1]]` is document i."""

    ids: np.ndarray  # uint16 [num_tokens]
    learnt: np.ndarray  # bool [num_tokens]
    starts: np.ndarray  # int64 [num_documents + 1]


def encode(documents: list[list[tuple[str, bool]]], tokenizer: Tokenizer, max_tokens: int = 2047) -> Pool:
    pieces = [piece for pieces in documents for piece in pieces]
    encoded = iter(
        [
            (e.ids, learnt)
            for e, (_, learnt) in zip(tokenizer.encode_batch_fast([text for text, _ in pieces]), pieces, strict=True)
        ]
    )
    ids, learnt, starts = [], [], [0]
    for pieces in documents:
        parts = [next(encoded) for _ in pieces]
        length = sum(len(part) for part, _ in parts)
        if length > max_tokens:
            continue
        for part, is_learnt in parts:
            ids.append(np.array(part, dtype=np.uint16))
            learnt.append(np.full(len(part), is_learnt))
        starts.append(starts[-1] + length)
    return Pool(np.concatenate(ids), np.concatenate(learnt), np.array(starts))


def build_pools(
    corpus: Path, tokenizer_file: Path | None, views: int
) -> tuple[Tokenizer, dict[str, Pool], dict[str, Pool]]:
    """The tokenizer, the training pools and the validation pools. Each story appears `views` times."""
    draw = random.Random(1)
    book_chapters, held_chapters = read_books(corpus)
    stories, held_stories = read_stories(corpus)
    nouns = find_nouns(stories)
    if tokenizer_file is None:
        sample = [p for chapter in draw.sample(book_chapters, len(book_chapters) // 3) for p in chapter]
        tokenizer = train_tokenizer(sample + 6 * stories)
    else:
        tokenizer = with_markers(Tokenizer.from_file(str(tokenizer_file)))

    simple_words = {
        word for word, count in Counter(re.findall(r"[a-z]+", " ".join(stories).lower())).items() if count >= 3
    }

    def simplicity(text: str) -> float:
        words = re.findall(r"[a-z]+", text.lower())
        return sum(word in simple_words for word in words) / max(len(words), 1)

    books = [p for _ in range(3) for chapter in book_chapters for p in passages(chapter, draw)]
    books = [(simplicity(p), p) for p in books]
    easy = [p for score, p in books if score > 0.9]
    told = [rename(story, draw) if view else story for view in range(views) for story in stories]
    held_books = [p for chapter in held_chapters for p in passages(chapter, draw)]
    train = {
        "books": [document(p, draw) for score, p in books if score > 0.75],
        "easy": [document(p, draw) for p in easy],
        "stories": [document(s, draw) for s in told],
        "chat": [story_chat(s, stories, nouns, draw) for s in told],
        "old_chat": [chat([ask(p, nouns, OLD_REQUESTS, draw)], draw) for p in easy if len(p) < 3000],
        "talk": [chat([small_talk(draw) for _ in range(draw.choice([1, 1, 2]))], draw) for _ in range(2000)],
    }
    held = {
        "seen stories": [document(s, draw) for s in stories[:HELD_OUT_STORIES]],
        "held stories": [document(s, draw) for s in held_stories],
        "held chat": [story_chat(s, held_stories, nouns, draw) for s in held_stories],
        "held books": [document(p, draw) for p in held_books[:100]],
    }
    return (
        tokenizer,
        {k: encode(v, tokenizer) for k, v in train.items()},
        {k: encode(v, tokenizer) for k, v in held.items()},
    )


# The share of each pool in a batch's tokens at the start and at the end, interpolated linearly.
SHARES = {
    "books": (0.55, 0.08),
    "easy": (0.22, 0.22),
    "stories": (0.08, 0.27),
    "chat": (0.10, 0.36),
    "old_chat": (0.04, 0.05),
    "talk": (0.01, 0.02),
}


class Sampler:
    """Samples rows of whole documents; every row starts with the start of a document, and its last one may be cut."""

    def __init__(self, pools: dict[str, Pool], seed: int):
        self.pools, self.draw, self.names = pools, np.random.default_rng(seed), list(pools)
        self.orders: dict[str, list[int]] = {name: [] for name in pools}
        self.mean_tokens = np.array([len(p.ids) / (len(p.starts) - 1) for p in pools.values()])
        self.seen_tokens = dict.fromkeys(pools, 0)

    def next_document(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        pool, order = self.pools[name], self.orders[name]
        if not order:
            order.extend(self.draw.permutation(len(pool.starts) - 1).tolist())
        index = order.pop()
        span = slice(pool.starts[index], pool.starts[index + 1])
        return pool.ids[span], pool.learnt[span]

    def batch(self, progress: float, rows: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, both [rows, context]; a label that is not learnt is -100."""
        shares = (
            np.array([SHARES[n][0] + progress * (SHARES[n][1] - SHARES[n][0]) for n in self.names]) / self.mean_tokens
        )
        inputs, labels = np.zeros((rows, context), np.int64), np.full((rows, context), -100, np.int64)
        for row in range(rows):
            filled = 0
            while filled < context + 1:
                name = self.names[self.draw.choice(len(self.names), p=shares / shares.sum())]
                ids, learnt = self.next_document(name)
                ids, learnt = ids[: context + 1 - filled], learnt[: context + 1 - filled]
                target = np.where(learnt, ids.astype(np.int64), -100)
                if filled == 0:
                    target[0] = -100
                inputs[row, filled : filled + len(ids)] = ids[: context - filled]
                lead = 1 if filled == 0 else 0
                labels[row, filled - 1 + lead : filled - 1 + len(ids)] = target[lead:]
                filled += len(ids)
                self.seen_tokens[name] += len(ids)
        return torch.from_numpy(inputs), torch.from_numpy(labels)


# --- model: Llama with the parameter names of Hugging Face, and dropout -----------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split form. x: [rows, heads, context, head_dim]; cos, sin: [context, head_dim]"""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, context, _ = x.shape
        q = self.q_proj(x).view(rows, context, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(rows, context, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(rows, context, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, context, -1))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        width = CONFIG["hidden_size"]
        self.input_layernorm = nn.RMSNorm(width, eps=CONFIG["rms_norm_eps"])
        self.self_attn = Attention(
            width, CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], CONFIG["head_dim"]
        )
        self.post_attention_layernorm = nn.RMSNorm(width, eps=CONFIG["rms_norm_eps"])
        self.mlp = MLP(width, CONFIG["intermediate_size"])
        self.dropout = dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Llama(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                out_of_a_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * len(self.layers)) if out_of_a_branch else 1))
        half = torch.arange(0, CONFIG["head_dim"], 2) / CONFIG["head_dim"]
        angles = torch.outer(
            torch.arange(CONFIG["max_position_embeddings"]).float(), CONFIG["rope_theta"] ** -half
        ).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean loss in nats over the learnt labels. ids, labels: [rows, context]"""
        x = F.dropout(self.embed_tokens(ids), self.dropout, self.training)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


# --- training ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model: nn.Module, pool: Pool, device: str) -> float:
    """Mean loss in nats a learnt token; each document on its own, from position 0."""
    model.eval()
    total = count = 0.0
    context = 512
    documents = [slice(a, min(b, a + context + 1)) for a, b in zip(pool.starts[:-1], pool.starts[1:], strict=True)]
    for first in range(0, len(documents), 32):
        group = documents[first : first + 32]
        inputs, labels = torch.zeros(len(group), context, dtype=torch.long), torch.full((len(group), context), -100)
        for row, span in enumerate(group):
            ids = torch.from_numpy(pool.ids[span].astype(np.int64))
            inputs[row, : len(ids) - 1] = ids[:-1]
            labels[row, : len(ids) - 1] = torch.where(torch.from_numpy(pool.learnt[span])[1:], ids[1:], -100)
        learnt = (labels != -100).sum().item()
        with torch.autocast(device, torch.bfloat16):
            total += model(inputs.to(device), labels.to(device)).item() * learnt
        count += learnt
    model.train()
    return total / count


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over the first 3 %, then a cosine down to a hundredth."""
    if progress < 0.03:
        return peak * progress / 0.03
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def train(args: argparse.Namespace, pools: dict[str, Pool], held: dict[str, Pool]) -> tuple[Llama, dict[str, object]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = Llama(args.dropout).to(device)
    print(f"parameters {sum(p.numel() for p in model.parameters())} device {device}", flush=True)
    if args.steps == 0:
        return model, {}
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    step_model = torch.compile(model) if device == "cuda" else model
    sampler = Sampler(pools, args.seed)
    begin = time.monotonic()
    step, progress, losses = 0, 0.0, torch.zeros((), device=device)
    while progress < 1.0:
        # The last part runs on rows of twice the length, so that every position that is served has been trained.
        rows, context = (args.rows, 1024) if progress < 0.7 else (args.rows // 2, 2048)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        inputs, labels = sampler.batch(progress, rows, context)
        with torch.autocast(device, torch.bfloat16):
            loss = step_model(inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses += loss.detach()
        step += 1
        progress = max(step / args.steps, (time.monotonic() - begin) / args.seconds)
        if step % args.report == 0:
            mean = losses.item() / args.report  # the only intended synchronisation
            losses.zero_()
            held_loss = " ".join(
                f"{name.replace(' ', '_')}={measure(model, pool, device):.3f}" for name, pool in held.items()
            )
            print(f"step={step} seconds={time.monotonic() - begin:.0f} train={mean:.3f} {held_loss}", flush=True)
    facts = {
        "steps": step,
        "tokens": sum(sampler.seen_tokens.values()),
        "seconds": round(time.monotonic() - begin),
        "machine": f"one {torch.cuda.get_device_name()}" if device == "cuda" else "CPU",
        "losses": {name: round(measure(model, pool, device), 3) for name, pool in held.items()},
        "seen_tokens": sampler.seen_tokens,
        "pool_tokens": {name: len(pool.ids) for name, pool in pools.items()},
    }
    return model, facts


# --- the folder -------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_folder(out: Path, model: Llama, tokenizer: Tokenizer) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", CONFIG)
    write_json(
        out / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": [1, 0], "do_sample": True, "temperature": 0.7, "top_p": 0.9},
    )
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)


PROMPTS = [
    ("plain", "Once upon a time"),
    ("plain", "One day, a little fox"),
    ("plain", "The old king had three sons."),
    ("chat", "Tell me a story about a fox and a river."),
    ("chat", "Write a short story about a boy and his kite."),
    ("chat", "Hello, who are you?"),
]


def sample(out: Path) -> list[dict[str, object]]:
    """Load the folder as a user would, and continue PROMPTS greedily and at temperature 0.8, seeds 0, 1, 2..."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # optional: only this last step needs it

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(out),
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device),
    )
    samples = []
    for seed, (form, prompt) in enumerate(PROMPTS):
        messages = [{"role": "user", "content": prompt}]
        text = (
            prompt
            if form == "plain"
            else tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
        for way in (
            {"do_sample": False, "temperature": None, "top_p": None},
            {"do_sample": True, "temperature": 0.8, "top_p": 1.0, "top_k": 0},
        ):
            torch.manual_seed(seed)
            new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=500, pad_token_id=0, **way)[
                0, ids.shape[1] :
            ]
            stopped = new[-1].item() in (0, 1)
            how = "temperature 0.8" if way["do_sample"] else "greedy"
            samples.append(
                {"form": form, "how": how, "seed": seed, "prompt": prompt, "tokens": len(new), "stopped": stopped,
                 "text": tokenizer.decode(new, skip_special_tokens=True)}
            )  # fmt: skip
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the two corpus files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to keep")
    parser.add_argument("--steps", type=int, default=2600, help="optimizer steps; 0 writes random weights")
    parser.add_argument(
        "--seconds", type=float, default=420, help="time limit of the training; the learning rate is annealed within it"
    )
    parser.add_argument("--rows", type=int, default=64, help="rows of 1,024 tokens a step")
    parser.add_argument("--views", type=int, default=12, help="views of each story with other names")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--report", type=int, default=200, help="steps between two reports")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.monotonic()
    tokenizer, pools, held = build_pools(args.corpus, args.tokenizer, args.views)
    sizes = " ".join(f"{name}={len(pool.starts) - 1}/{len(pool.ids)}" for name, pool in {**pools, **held}.items())
    print(f"documents/tokens {sizes} seconds={time.monotonic() - begin:.0f}", flush=True)
    model, facts = train(args, pools, held)
    write_folder(args.out, model, tokenizer)
    if not facts:
        return
    print(json.dumps(facts), flush=True)
    samples = sample(args.out)
    write_json(args.out / "training.json", {"facts": facts, "samples": samples})
    for entry in samples:
        print("---", entry["form"], entry["how"], f"tokens={entry['tokens']} stopped={entry['stopped']}", flush=True)
        print(entry["prompt"], "||", entry["text"], flush=True)


if __name__ == "__main__":
    main()
