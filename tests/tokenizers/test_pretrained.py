"""Tokenizers of other libraries' models, against transformers' own reading of the same files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf

from llmfast.errors import InputError
from llmfast.tokenizers import PretrainedTokenizer, load_saved

SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>"]
# As Llama 3's and Qwen's are written: what a conversation begins with, a system message of its own, trimmed contents,
# a date, a loop that skips, and a refusal.
TEMPLATE = """{{ bos_token }}{%- if messages[0]['role'] != 'system' %}
<|start|>system
You are kind. {{ strftime_now('%Y') | length }}<|end|>
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'comment' %}{% continue %}{% endif %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('there is no role ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
    {{- '<|start|>assistant\\n' }}{% generation %}{{ message.content | trim }}<|end|>{% endgeneration %}
    {%- else %}
    {{- '<|start|>' + message.role + '\\n' + message.content | trim + '<|end|>' }}
    {%- endif %}
    {%- if message.extra is defined %}{{ message.extra | tojson }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"""
TALK = [
    {"role": "user", "content": "  Grüße & <b>hello</b> "},
    {"role": "comment", "content": "not said"},
    {"role": "assistant", "content": "hi", "extra": {"ü": [1, "<"]}},
    {"role": "user", "content": "and now?"},
]


def backend(kind: str, adds_bos: bool) -> hf.Tokenizer:
    """A small tokenizer: byte-level as Llama 3's, or of words with spaces in them as Gemma's."""
    if kind == "bytes":
        made = hf.Tokenizer(hf.models.BPE())
        made.pre_tokenizer, made.decoder = hf.pre_tokenizers.ByteLevel(add_prefix_space=False), hf.decoders.ByteLevel()
        alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
        trainer = hf.trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
        made.train_from_iterator(["hello there and now hello system user assistant kind"] * 3, trainer)
    else:
        known = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "he", "ll", "hell"]
        merges = [("h", "e"), ("l", "l"), ("he", "ll")]
        made = hf.Tokenizer(hf.models.BPE({token: i for i, token in enumerate(known)}, merges, byte_fallback=True))
        made.add_special_tokens(SPECIAL)
        made.normalizer = hf.normalizers.Replace(" ", "▁")
        made.decoder = hf.decoders.Sequence(
            [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
        )
    if adds_bos:
        made.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def folder_of(path: Path, kind: str = "bytes", adds_bos: bool = True, **config: Any) -> Path:
    backend(kind, adds_bos).save(str(path / "tokenizer.json"))
    values = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(values | config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    return path


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_prompts_are_those_of_transformers(tmp_path: Path, kind: str, adds_bos: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = PretrainedTokenizer.load(folder_of(tmp_path, kind, adds_bos))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("hello there", "  two  spaces", "Grüße 🎉\n", "hello<|end|>now", "a</s>"):
        assert ours.prompt_ids(text) == theirs(text).input_ids, text
        assert ours.decode(ours.prompt_ids(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
    assert ours.stop_ids == {1, 3} and ours.vocab_size == len(theirs)


def test_a_text_begins_once(tmp_path: Path) -> None:
    ours = PretrainedTokenizer.load(folder_of(tmp_path))
    assert ours.prompt_ids("<s>hello") == ours.prompt_ids("hello")
    assert ours.prompt_ids("hello").count(0) == 1 and ours.encode("hello").count(0) == 0
    assert ours.prompt_ids("") == [0]  # something to continue
    bare = PretrainedTokenizer.load(folder_of(tmp_path, adds_bos=False, bos_token=None))
    assert bare.prompt_ids("") == [1] and bare.prompt_ids("hello") == bare.encode("hello")


def test_an_end_that_is_added_is_left_out(tmp_path: Path) -> None:
    """Some tokenizers end every text; a model that is to continue one must not see that."""
    folder_of(tmp_path)
    made = backend("bytes", False)
    made.post_processor = hf.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    ours = PretrainedTokenizer.load(tmp_path)
    assert ours.prompt_ids("hello") == [0, *ours.encode("hello")]
    assert ours.prompt_ids("hello</s>")[-1] == 1


@pytest.mark.parametrize("where", ["config", "list", "jinja", "json"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_conversations_are_those_of_transformers(tmp_path: Path, where: str, add_generation_prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    folder_of(tmp_path, **{"config": {"chat_template": TEMPLATE}, "list": {"chat_template": named}}.get(where, {}))
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    if where == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    ours = PretrainedTokenizer.load(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.chat_template = TEMPLATE
    for talk in (TALK, [{"role": "system", "content": "Be brief."}, *TALK]):
        expected = theirs.apply_chat_template(
            talk, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
        ids = ours.chat_ids(talk, add_generation_prompt=add_generation_prompt)
        assert ids == expected and ids.count(0) == 1


@pytest.mark.parametrize("template", [
    "{{ raise_exception('roles must alternate') }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ messages[0].content",
    "{{ messages.append(1) }}",
    "{{ 1 / 0 }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ 'a' * 10**15 }}",
    "{{ [].index(3) }}",
    "{{ '\\ud800' }}",
    "{% if %}",
])  # fmt: skip
def test_templates_that_are_refused(tmp_path: Path, template: str) -> None:
    ours = PretrainedTokenizer.load(folder_of(tmp_path, chat_template=template))
    with pytest.raises(InputError, match="the chat template does not take this conversation: .") as raised:
        ours.chat_ids([{"role": "user", "content": "hello"}])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "data", "word"),
    [
        ("tokenizer_config.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not readable JSON"),
        ("special_tokens_map.json", b'{"bos_token": "<s>", "bos_token": "</s>"}', "'bos_token' is given twice"),
        ("generation_config.json", b"\xff\xfe\xff", "is not readable JSON"),
        ("chat_template.json", b"[]", "is not a JSON object"),
        ("chat_template.jinja", b"\xff\xfe\xff", "is not UTF-8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_damaged_files(tmp_path: Path, file: str, data: bytes, word: str) -> None:
    (folder_of(tmp_path) / file).write_bytes(data)
    with pytest.raises(InputError, match=word) as raised:
        PretrainedTokenizer.load(tmp_path)
    assert file in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_files_that_never_end(tmp_path: Path) -> None:
    (folder_of(tmp_path) / "tokenizer_config.json").unlink()
    os.mkfifo(tmp_path / "tokenizer_config.json")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: is no regular file"):
        PretrainedTokenizer.load(tmp_path)


def test_ends_are_whole_numbers(tmp_path: Path) -> None:
    """True equals 1."""
    folder_of(tmp_path, eos_token="<|end|>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [true, 2, "x", null]}')
    assert PretrainedTokenizer.load(tmp_path).stop_ids == {2, 3}


def test_without_a_template_and_without_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        PretrainedTokenizer.load(tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        PretrainedTokenizer.load(folder_of(tmp_path)).chat_ids([])
    (tmp_path / "generation_config.json").write_text("[1")
    with pytest.raises(InputError, match=r"generation_config\.json: is not readable JSON"):
        PretrainedTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a readable tokenizer"):
        PretrainedTokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_text_as_it_comes(tmp_path: Path, kind: str) -> None:
    """Pieces add up to the text, no character is cut, and special tokens are not shown."""
    ours = PretrainedTokenizer.load(folder_of(tmp_path, kind))
    text = "hello there Grüße 🎉 now"
    decoder = ours.stream_decoder()
    pieces = [decoder.push(token) for token in [*ours.prompt_ids(text), 3]] + [decoder.finish()]
    assert "".join(pieces) == text and not any("�" in piece for piece in pieces)


def test_fingerprints_and_files(tmp_path: Path) -> None:
    """Equal for what makes the same documents, and through `save`; another for each of what decides one."""

    def load(name: str, **kwargs: Any) -> PretrainedTokenizer:
        (tmp_path / name).mkdir()
        return PretrainedTokenizer.load(folder_of(tmp_path / name, **kwargs))

    first, again = load("first", chat_template=TEMPLATE), load("again")
    others = [load("a", adds_bos=False), load("b", kind="metaspace"), load("c", eos_token="<|end|>")]
    assert first.fingerprint == again.fingerprint
    assert len({tokenizer.fingerprint for tokenizer in (first, *others)}) == 4
    (tmp_path / "saved").mkdir()
    first.save(tmp_path / "saved")
    saved = load_saved(tmp_path / "saved")
    assert isinstance(saved, PretrainedTokenizer) and saved.fingerprint == first.fingerprint
    assert saved.chat_ids(TALK) == first.chat_ids(TALK) and saved.stop_ids == {1, 3}


def test_what_ends_a_document(tmp_path: Path) -> None:
    """eos_token, which ends answers, too; without one, the token named so elsewhere; else one that ends answers."""
    ours = PretrainedTokenizer.load(folder_of(tmp_path, eos_token="<|start|>"))
    assert ours.eot_id == 2 and ours.stop_ids == {1, 2, 3} and ours.start_ids == (0,)
    assert PretrainedTokenizer.load(folder_of(tmp_path, eos_token=None)).eot_id == 1
    generation = folder_of(tmp_path, eos_token=None) / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [-1, 3, 10**6]}))
    assert PretrainedTokenizer.load(tmp_path).eot_id == 3  # the others are no tokens of the tokenizer
    generation.write_text(json.dumps({"eos_token_id": -1}))
    with pytest.raises(InputError, match="nothing to end a text"):
        assert PretrainedTokenizer.load(tmp_path).eot_id
    assert PretrainedTokenizer.load(folder_of(tmp_path, bos_token=None, eos_token="<s>")).start_ids == ()
    made = backend("bytes", True)
    made.add_special_tokens(["<|endoftext|>"])
    folder_of(tmp_path, eos_token=None)
    made.save(str(tmp_path / "tokenizer.json"))
    end = made.token_to_id("<|endoftext|>")
    ours = PretrainedTokenizer.load(tmp_path)
    assert ours.eot_id == end and ours.stop_ids == {1, 3, end}
    assert end in ours.encode("<|endoftext|>") and end not in ours.encode_batch(["<|endoftext|>"])[0]
