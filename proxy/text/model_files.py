"""What the files of a Hugging Face model folder say about its text, and which wins: by the rules of transformers 5.

Tokens. `tokenizer.json` is the tokenizer, its post-processor alone decides what goes around a text (`add_bos_token`
counts for no tokenizer that has this file). Added to it, where it lacks them or has them with other flags:
  1. the tokens of `added_tokens_decoder` in `tokenizer_config.json`, or, only where that key is missing, those of
     `added_tokens.json` that `tokenizer.json` does not name by the same id;
  2. the named special tokens (`bos_token`, `eos_token` ..., a model's own `image_token`, an object of
     `extra_special_tokens`) of `tokenizer_config.json`; where `added_tokens_decoder` is missing,
     `special_tokens_map.json` wins over it;
  3. the list `extra_special_tokens`, in older files `additional_special_tokens`, of the same two files.
An id in these files counts for their order only: the tokenizer numbers new tokens itself, without gaps.
`split_special_tokens` makes special tokens in a text text.

Chat template: `additional_chat_templates/*.jinja` and `chat_template.jinja`, which is named "default"; without any of
them `chat_template` of `tokenizer_config.json`, as text, list or object; without that the one of `chat_template.json`,
where older folders of models that see images have it. Of several the one named "default" is taken, and in chats with
tools the one named "tool_use".

End tokens: those of `generation_config.json`, those of `config.json` only where the former names none; and always the
tokenizer's `eos_token`, which transformers leaves to its callers, as chats of fine-tuned models end with it (vLLM, too,
ends at the tokenizer's and at those of `generation_config.json`).

Knows no requests, and needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from baton.node.decoder_config import decoder_config
from baton.node.errors import SettingsError
from baton.node.model_folder import (
    MAX_CONFIG_BYTES,
    MAX_END_TOKENS,
    MAX_TOKENIZER_BYTES,
    MAX_TOKENS_BYTES,
    MAX_VOCAB_SIZE,
    read_file,
    read_object,
)
from baton.node.telemetry import excerpt
from baton.proxy.text.growth import check_growth

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
_DEFAULT, _WITH_TOOLS = "default", "tool_use"
"""Names of chat templates."""
MAX_TEMPLATE_BYTES = 1 << 20
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's `generation_config.json` recommends where a client says nothing; OpenAI's values elsewhere."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The text side of one folder, as all of its files together have it."""

    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]
    """The named ones, `bos_token` and the like, for templates."""
    template: str
    """Source of the chat template; empty where there is none."""
    tools_template: str
    """Of chats with tools; empty where they have no other one."""
    table_size: int
    """Rows of the model's table of tokens; 0 where config.json does not say."""
    eos_ids: tuple[int, ...]
    defaults: SamplingDefaults


def read_model_files(folder: Path, chat_template: Path | None = None) -> ModelFiles:
    """`chat_template`: a file instead of the folder's. Raises SettingsError where the folder has no tokenizer, or a
    file cannot be read."""
    config = decoder_config(_read_json(folder / "config.json", MAX_CONFIG_BYTES))
    generation = _read_json(folder / "generation_config.json", MAX_CONFIG_BYTES)
    names = _read_json(folder / "tokenizer_config.json")
    templates = _templates(folder, names) if chat_template is None else {_DEFAULT: _read_text(chat_template)}
    tokenizer = _read_tokenizer(folder / "tokenizer.json")
    named = _add_tokens(tokenizer, folder, names)
    tokenizer.encode_special_tokens = names.get("split_special_tokens") is True
    eos = _end_ids(folder / "generation_config.json", generation) or _end_ids(folder / "config.json", config)
    eos += _ids(tokenizer.token_to_id(named["eos_token"]) if "eos_token" in named else None)
    return ModelFiles(
        tokenizer=tokenizer,
        special_tokens=named,
        template=templates.get(_DEFAULT, ""),
        tools_template=templates.get(_WITH_TOOLS, "") if _DEFAULT in templates else "",
        table_size=_table_size(folder / "config.json", config, tokenizer),
        eos_ids=tuple(sorted(set(eos))),
        defaults=_sampling_defaults(generation),
    )


# ---- tokens -------------------------------------------------------------------------------------------------------


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        source = read_file(path, MAX_TOKENIZER_BYTES)
    except FileNotFoundError:
        raise SettingsError(
            f"no {path.name} in {path.parent}: a tokenizer in Hugging Face's fast format is needed"
            f"{_other_tokenizer(path.parent)}"
        ) from None
    try:
        tokenizer = Tokenizer.from_buffer(source)
    except BaseException as error:  # the library raises bare Exception for faults of the file, and panics for some
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise SettingsError(f"{path} is not a tokenizer: {excerpt(error)}") from None
    check_growth(path, tokenizer)
    tokenizer.no_truncation()  # files of training runs carry a truncation that would silently cut prompts
    tokenizer.no_padding()
    return tokenizer


def _other_tokenizer(folder: Path) -> str:
    """What to do about a tokenizer in another format."""
    found = next((name for name in _OTHER_TOKENIZERS if (folder / name).is_file()), "")
    if not found:
        return ""
    return (
        f"; of {found} transformers may write one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER); "
        "it needs sentencepiece, tiktoken or mistral-common for some"
    )


def is_panic(error: BaseException) -> bool:
    """Whether a Rust library met a bug of its own, for instance a pattern that needs too many steps. Its exception has
    no Exception among its bases, and can be imported from nowhere."""
    return type(error).__name__ == "PanicException"


def _add_tokens(tokenizer: Tokenizer, folder: Path, names: Mapping[str, Any]) -> dict[str, str]:
    """Add to `tokenizer` what the other files name; the texts of the named special tokens."""
    own = tokenizer.get_added_tokens_decoder()
    named, further = _special_tokens(folder, names)
    listed = _listed_tokens(folder, names, [*(named[key] for key in _SPECIAL_NAMES if key in named), *further], own)
    known = {repr(token) for token in own.values()}
    added = [token for _, token in sorted(listed.items()) if repr(token) not in known]
    texts = {token.content for token in (*own.values(), *added)}
    for token in (*named.values(), *further):
        if token.content not in texts:
            texts.add(token.content)
            added.append(token)
    special = {token.content for token in named.values()}
    tokenizer.add_tokens([_as_special(token) if token.content in special else token for token in added])
    return {key: token.content for key, token in named.items()}


def _special_tokens(folder: Path, names: Mapping[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The named special tokens, in the order in which they get ids, and the further ones."""
    where, older_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    extra = names.get("extra_special_tokens") or names.get("additional_special_tokens")
    named, further = _named(names, where), _further(extra, where)
    if isinstance(extra, dict):
        named |= {key: _token(value, where) for key, value in extra.items()}
    if "added_tokens_decoder" not in names:
        older = _read_json(older_path)
        named = {key: token for key, token in named.items() if older.get(key, token) is not None}
        named |= _named(older, older_path, special=True)
        more = older.get("extra_special_tokens") or (None if extra else older.get("additional_special_tokens"))
        if isinstance(more, dict):
            named |= {key: _token(value, older_path) for key, value in more.items()}
            further = []
        further += _further(more, older_path, special=True)
    return {key: named[key] for key in (*_SPECIAL_NAMES, *named) if key in named}, further


def _listed_tokens(
    folder: Path, names: Mapping[str, Any], special: Iterable[AddedToken], own: Mapping[int, AddedToken]
) -> dict[int, AddedToken]:
    """The tokens that a file lists by id."""
    where, older_path = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if "added_tokens_decoder" in names:
        listed = names["added_tokens_decoder"]
        if not isinstance(listed, dict):
            raise SettingsError(f"added_tokens_decoder in {where} is no object")
        return {_id(key, where): _token(value, where) for key, value in listed.items()}
    texts = {token.content for token in special}
    older = {
        _id(token_id, older_path): AddedToken(text, special=text in texts, normalized=text not in texts)
        for text, token_id in _read_json(older_path).items()
    }
    return {**older, **own}


def _named(names: Mapping[str, Any], where: Path, special: bool = False) -> dict[str, AddedToken]:
    """The usual names, and those of the model's own; `add_bos_token` and the like are switches."""
    found = {key: value for key, value in names.items() if key in _SPECIAL_NAMES and value is not None}
    for key, value in names.items():
        if key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value)):
            found.setdefault(key, value)
    return {key: _token(value, where, special) for key, value in found.items()}


def _further(value: object, where: Path, special: bool = False) -> list[AddedToken]:
    """The special tokens of a list; those of an object are named ones."""
    if value is None or isinstance(value, dict):
        return []
    if not isinstance(value, list):
        raise SettingsError(f"the special tokens in {where} are neither a list nor an object")
    return [_token(entry, where, special) for entry in value]


def _token(value: object, where: Path, special: bool = False) -> AddedToken:
    """A token stands in a file as its text, then it is special, or as {"content": text, flags ...}.

    `special` makes it so whatever its flags say.
    """
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise SettingsError(f"a token in {where} is neither a text nor an object with a content")
    flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
    return AddedToken(value["content"], **(flags | {"special": True} if special else flags))


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _id(value: object, where: Path) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise SettingsError(f"the id of a token in {where} is no number")


# ---- chat template ------------------------------------------------------------------------------------------------


def _templates(folder: Path, names: Mapping[str, Any]) -> dict[str, str]:
    """The templates that are used, by name."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (path := folder / "chat_template.jinja").is_file():
        files.setdefault(_DEFAULT, path)
    if files:
        return {name: _read_text(files[name]) for name in (_DEFAULT, _WITH_TOOLS) if name in files}
    path, source = folder / "tokenizer_config.json", names.get("chat_template")
    if source is None:
        path = folder / "chat_template.json"
        source = _read_json(path).get("chat_template")
    if isinstance(source, list):
        source = dict(_named_templates(source))
    if not isinstance(source, dict):
        source = {_DEFAULT: source}
    found = {name: source[name] for name in (_DEFAULT, _WITH_TOOLS) if source.get(name) is not None}
    if not all(isinstance(each, str) for each in found.values()):
        raise SettingsError(f"chat_template in {path} is no text")
    return found


def _named_templates(entries: Iterable[object]) -> Iterable[tuple[str, object]]:
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            yield entry["name"], entry.get("template")


def _read_text(path: Path) -> str:
    try:
        return read_file(path, MAX_TEMPLATE_BYTES).decode()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {excerpt(error)}") from None


# ---- plain values -------------------------------------------------------------------------------------------------


def _read_json(path: Path, max_bytes: int = MAX_TOKENS_BYTES) -> dict[str, Any]:
    """The object in `path`, empty where there is no such file."""
    try:
        return read_object(path, max_bytes)
    except FileNotFoundError:
        return {}


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0]


def _end_ids(path: Path, config: Mapping[str, Any]) -> list[int]:
    found = _ids(config.get("eos_token_id"))
    if len(found) > MAX_END_TOKENS:
        raise SettingsError(f"{path}: 'eos_token_id' lists more than {MAX_END_TOKENS} tokens")
    return found


def _table_size(path: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> int:
    value = config.get("vocab_size", 0)
    size = value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
    largest_id = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if size > MAX_VOCAB_SIZE or largest_id >= MAX_VOCAB_SIZE:
        raise SettingsError(f"{path.parent}: more than {MAX_VOCAB_SIZE} token ids")
    return size


def _sampling_defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    """Values that are no number, or out of the range that a request may have, are as if not there."""

    def number(key: str, low: float, high: float, otherwise: float) -> float:
        value = generation.get(key)
        usable = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # NaN is not
        return float(value) if usable and value is not None else otherwise

    return SamplingDefaults(
        temperature=number("temperature", 0.0, 100.0, 1.0),
        top_p=number("top_p", 1e-9, 1.0, 1.0),
        top_k=int(number("top_k", 0, 1 << 30, 0)),
        min_p=number("min_p", 0.0, 1.0, 0.0),
        repetition_penalty=number("repetition_penalty", 1e-9, 100.0, 1.0),
    )
