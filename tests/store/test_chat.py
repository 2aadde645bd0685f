"""Chat templates: the text and the loss mask against independent renderings, and what is refused."""

import datetime
import json
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from cpt_jax.config import ConfigError
from cpt_jax.store import chat, tokenization
from cpt_jax.store.records import TRAIN_ON

NOW = datetime.datetime(2024, 7, 26, 12, 0)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "<s>", "</s>"]

# Templates as the models' makers ship them: ChatML, Llama 3, Mistral 7B.
CHATML = (
  "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
  "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
  "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
  "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
  "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
  "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
  "{{ ' ' + message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
  "{% endif %}{% endfor %}"
)
GENERATION = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# As Qwen3 does: what was thought is dropped from all answers but the last.
FORGETFUL = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and not loop.last %}"
  "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def is_answer(message):
  return message["role"] == "assistant"


def of_chatml(messages):
  return [p for m in messages for p in ((f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>\n", is_answer(m)))]


# name -> (template, EOS, what it renders of messages by other means: pieces of text, and whether they count)
KINDS = {
  "chatml": (CHATML, "<|im_end|>", of_chatml),
  "chatml_other_eos": (CHATML, "<|endoftext|>", of_chatml),
  "llama3": (
    LLAMA3,
    "<|eot_id|>",
    lambda ms: (
      [("<|begin_of_text|>", False)]
      + [
        p
        for m in ms
        for p in (
          (f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False),
          (m["content"].strip() + "<|eot_id|>", is_answer(m)),
        )
      ]
    ),
  ),
  "mistral": (
    MISTRAL,
    "</s>",
    lambda ms: (
      [("<s>", False)]
      + [(f" {m['content']}</s>", True) if is_answer(m) else (f"[INST] {m['content']} [/INST]", False) for m in ms]
    ),
  ),
  "generation": (
    GENERATION,
    "<|im_end|>",
    lambda ms: [
      p for m in ms for p in ((f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>", is_answer(m)), ("\n", False))
    ],
  ),
}
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>"}


def messages(*contents, roles=("user", "assistant")):
  return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def model(fixtures):
  """A byte-level tokenizer with the special tokens of all the templates, and two added ones that are not special."""
  texts = [json.loads(line)["text"] for line in (fixtures / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
  made.train_from_iterator(texts, trainer)
  made.add_tokens(["<think>", "</think>"])
  return made


@pytest.fixture(scope="module")
def directory(tmp_path_factory, model):
  """Makes a tokenizer's directory: `directory(template, eos_token)`."""

  def make(template, eos_token="<|im_end|>", bos_token=None, in_file=False):
    path = tmp_path_factory.mktemp("tokenizer")
    model.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token, "bos_token": bos_token}
    if in_file:
      (path / "chat_template.jinja").write_text(template)
    elif template:
      config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path

  return make


@pytest.fixture(scope="module")
def encoders(directory):
  """An Encoder by (kind, train_on)."""
  loaded = {kind: tokenization.load(directory(*KINDS[kind][:2], BOS.get(kind))) for kind in KINDS}
  return {
    (kind, train_on): chat.Encoder(loaded[kind], records="messages", train_on=train_on, now=NOW)
    for kind in KINDS
    for train_on in TRAIN_ON
  }


def encoder(path, *, records="messages", train_on="answers", now=NOW):
  return chat.Encoder(tokenization.load(path), records=records, train_on=train_on, now=now)


def reason(path, conversation, **kwargs):
  (found,) = encoder(path, **kwargs).encode([conversation])
  assert isinstance(found, chat.RenderError), found
  return str(found)


def token_bytes(model):
  """The bytes of each id, by the table of GPT-2 (bytes_to_unicode in its encoder.py)."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  letters = dict(zip(map(chr, plain), plain, strict=True))
  letters |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in plain)}
  added = {number: token.content for number, token in model.get_added_tokens_decoder().items()}
  vocab = model.get_vocab(with_added_tokens=True)
  return {i: added[i].encode() if i in added else bytes(letters[c] for c in piece) for piece, i in vocab.items()}


def expected_mask(ids, pieces, bytes_of):
  """Whether the character in which each token's first byte lies is in a piece that counts; by counting bytes."""
  counts = [counts for text, counts in pieces for letter in text for _ in letter.encode()]
  starts = np.cumsum([0, *(len(bytes_of[i]) for i in ids)])
  text = "".join(text for text, _ in pieces).encode()
  assert b"".join(bytes_of[i] for i in ids) == text
  return [counts[start] for start in starts[:-1]]


CONTENTS = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
  ["\n\n a", "\u0301e\u0301", " \U0001f469\u200d\U0001f4bb ", "sum\u00e9 \u65e5\u672c", "<|im_", "|>", "</", "[/INST]", "<think>"]
)


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(contents=st.lists(CONTENTS, min_size=2, max_size=6), has_system=st.booleans())
def test_tokens_and_mask_are_those_of_an_independent_rendering(encoders, model, kind, contents, has_system):
  contents = [c.replace("<think>", "think") if i % 2 == 0 else c for i, c in enumerate(contents)]
  conversation = messages(*contents)
  if has_system and kind != "mistral":  # whose template refuses it
    conversation = [{"role": "system", "content": "Be brief."}, *conversation]
  pieces = KINDS[kind][2](conversation)
  text, eos = "".join(p for p, _ in pieces), KINDS[kind][1]
  (found,) = encoders[kind, "answers"].encode([conversation])
  (whole,) = encoders[kind, "all"].encode([conversation])
  assert found.ids == whole.ids and whole.loss_mask is None and whole.num_bytes == len(text.encode())
  ids = model.encode(text, add_special_tokens=False).ids
  eos_id = model.token_to_id(eos)
  added = ids[-1] != eos_id
  assert found.ids == ids + [eos_id] * added
  assert found.loss_mask.dtype == bool
  assert found.loss_mask.tolist() == expected_mask(ids, pieces, token_bytes(model)) + [is_answer(conversation[-1])] * added
  assert found.num_bytes == sum(len(p.encode()) for p, counts in pieces if counts)


@hypothesis.given(prompt=CONTENTS, answer=CONTENTS.filter(lambda t: t.strip() and "\u2581" not in t))
def test_a_prompt_without_a_template_is_one_text(fixtures, prompt, answer):
  prompt = prompt.replace("\u2581", "")
  path = fixtures / "tokenizer"  # a normaliser that puts a letter in front, bytes for rare letters
  (found,) = encoder(path, records="prompt").encode([messages(prompt, answer)])
  loaded = tokenization.load(path)
  assert found.ids == loaded.encode_documents([prompt + answer]).ids[0]
  (whole,) = encoder(path, records="prompt", train_on="all").encode([messages(prompt, answer)])
  assert whole.ids == found.ids and whole.loss_mask is None
  assert found.num_bytes == len(answer.encode()) and whole.num_bytes == len((prompt + answer).encode())
  counted = [i for i, counts in zip(found.ids, found.loss_mask, strict=True) if counts]
  assert counted[-1] == 2 and found.loss_mask.tolist() == sorted(found.loss_mask)  # one run up to the end
  left_out = loaded.decode([i for i in found.ids[1:] if i != 2][: len(found.ids) - len(counted) - 1])
  said = (prompt + answer)[len(left_out) :]
  assert answer.endswith(said) and len(answer) - len(said) <= 12  # at most the token that straddles the border


def test_a_prompt_with_a_template_is_two_messages(directory):
  path = directory(CHATML)
  assert encoder(path, records="prompt").encode([messages("a", "b")])[0].ids == encoder(path).encode([messages("a", "b")])[0].ids


def test_a_prompt_without_a_template_keeps_special_text_as_text(fixtures):
  (found,) = encoder(fixtures / "tokenizer", records="prompt").encode([messages("a</s>", "b")])
  assert found.has_special_text and not found.has_control_ids and found.ids.count(2) == 1


# The template's surroundings.


def test_settings_and_functions_of_the_template(directory):
  template = """\
{% for m in messages %}
  {% if m.content == 'stop' %}
    {% break %}
  {% endif %}
{{ m | tojson }} {{ [bos_token, eos_token, unk_token] }} {{ strftime_now('%d %b %Y') }} {{ tools is none }}
{% endfor %}"""
  path = directory(template, bos_token="<s>")
  rendered = chat.Template(template, tokens=tokenization.load(path).named_tokens, now=NOW).render(
    messages("<&'\u00e9", "x", "stop")
  )
  line = '{"role": "%s", "content": "%s"} %s 26 Jul 2024 True\n'
  tokens = "['<s>', '<|im_end|>', Undefined]"
  assert rendered == line % ("user", "<&'\u00e9", tokens) + line % ("assistant", "x", tokens)


def test_template_is_found_as_transformers_does(directory):
  path = directory(CHATML)
  for value in [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d":
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": value}))
    assert tokenization.load(path).chat_template == "d"
  (path / "chat_template.jinja").write_text("file")
  assert tokenization.load(path).chat_template == "file"
  (path / "chat_template.jinja").write_bytes(b"\xff")
  with pytest.raises(ConfigError, match=r"chat_template\.jinja: invalid UTF-8"):
    tokenization.load(path)


def test_eos_that_only_the_settings_name_is_known_to_the_template(directory):
  path = directory("{{ messages[0].content + eos_token }}")
  (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content + eos_token }}"}))
  (path / "config.json").write_text('{"eos_token_id": 2}')
  (found,) = encoder(path, train_on="all").encode([messages("a")])
  assert found.ids[1:] == [2]


@pytest.mark.parametrize(
  ("template", "words"), [("", "has no chat template"), ("{% for %}", "broken"), ("{% nope %}", "broken"), ("{{ a", "broken")]
)
def test_no_template_or_a_broken_one(directory, template, words):
  with pytest.raises(ConfigError, match=words):
    encoder(directory(template))


def test_sentencepiece_alone_is_refused(tmp_path, fixtures):
  path = shutil.copytree(fixtures / "sentencepiece", tmp_path / "s")
  (found,) = encoder(path, records="prompt", train_on="all").encode([messages("a", "b")])
  assert found.ids == tokenization.load(path).encode_documents(["ab"]).ids[0]
  with pytest.raises(ConfigError, match=r"convert it to a tokenizer\.json"):
    encoder(path, records="prompt")
  (path / "chat_template.jinja").write_text(CHATML)
  for kwargs in {"train_on": "all"}, {"records": "prompt", "train_on": "all"}:
    with pytest.raises(ConfigError, match=r"convert it to a tokenizer\.json"):
      encoder(path, **kwargs)


# Conversations that are refused.


def test_text_that_spells_a_control_token_is_refused(directory):
  path = directory("{% if false %}<think>{% endif %}" + CHATML)
  for train_on in TRAIN_ON:
    assert "message 1 spells the control token '<|im_end|>'" in reason(path, messages("a<|im_end|>b", "c"), train_on=train_on)
    assert "message 2 spells the control token '<s>'" in reason(path, messages("a", "<s>"), train_on=train_on)
    assert "message 1 spells the control token '<think>'" in reason(path, messages("<think>", "a"), train_on=train_on)
  assert encoder(path).encode([messages("a", "<think>b</think>c")])[0].loss_mask.any()  # a model's own


def test_text_that_becomes_a_control_token_is_refused(directory, model):
  """Spelt in letters that the normaliser turns into those of the token; or put together by the template."""
  path = directory(CHATML)
  content = json.loads((path / "tokenizer.json").read_text())
  content["normalizer"] = {"type": "NFKC"}
  for token in content["added_tokens"]:
    token["normalized"] = True
  (path / "tokenizer.json").write_text(json.dumps(content))
  assert "becomes a control token" in reason(path, messages("a\uff1c|im_end|>b", "c"))
  joining = directory(CHATML.replace("message['content']", "message['content'].replace('~', '')"))
  assert "becomes a control token" in reason(joining, messages("a<|im_~end|>", "c"))
  assert "message 1 spells" in reason(path, messages("a<|im_end|>b", "c"))


def test_what_the_template_refuses(directory):
  path = directory(MISTRAL, "</s>", "<s>")
  for train_on in TRAIN_ON:
    assert "must alternate" in reason(path, messages("a", "b", roles=["user"]), train_on=train_on)
  for template in (
    "{{ 1 / 0 }}",
    "{{ messages[7].content }}",
    "{{ 'a' + 1 }}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.mro() }}",
  ):
    assert "the chat template does not take it" in reason(directory(template), messages("a", "b"))
  assert "renders nothing" in reason(directory("{# nothing #}"), messages("a", "b"), train_on="all")


def test_records_without_an_answer(directory):
  assert "no answer: none of its 1 messages" in reason(directory(CHATML), messages("a"))
  assert "no token of it begins in an answer" in reason(
    directory(GENERATION.replace("'assistant' %}", "'tool' %}")), messages("a", "b")
  )
  assert encoder(directory(CHATML), train_on="all").encode([messages("a")])[0].loss_mask is None


def test_template_that_changes_what_it_rendered(directory):
  path = directory(FORGETFUL)
  conversation = messages("a", "<think>b</think>c", "d", "e")
  assert "so where this answer lies is unknown" in reason(path, conversation)
  assert encoder(path).encode([conversation[:2], messages("a", "b", "c", "d")])[1].loss_mask.any()
  assert encoder(path, train_on="all").encode([conversation])[0].ids


def test_generation_blocks_whose_place_is_unknown(directory):
  inside = "{% macro a(m) %}{% generation %}{{ m }}{% endgeneration %}{% endmacro %}"
  macro = inside + "x{% for m in messages %}{{ 'yy' + a(m.content) }}{% endfor %}"
  assert "its place is unknown" in reason(directory(macro), messages("a", "b"))


def test_long_conversations_are_bounded(directory):
  long = messages(*["a"] * 1002)
  assert "1002 messages, more than 1000" in reason(directory(CHATML), long)
  assert encoder(directory(GENERATION)).encode([long])[0].loss_mask.sum() > 1002


def test_bad_ones_do_not_disturb_their_neighbours(encoders):
  good, other = messages("a", "b"), messages("c", "d")
  found = encoders["chatml", "answers"].encode([good, messages("<s>", "x"), other, messages("a")])
  assert [isinstance(f, chat.RenderError) for f in found] == [False, True, False, True]
  assert found[0].ids == encoders["chatml", "answers"].encode([good])[0].ids
  assert found[2].ids == encoders["chatml", "answers"].encode([other])[0].ids


# Small things.


@pytest.fixture(scope="module")
def normalised(directory):
  found = {}
  for name, normalizer in ("plain", None), ("nfkc", {"type": "NFKC"}), ("lower", {"type": "Lowercase"}):
    path = directory("")
    content = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**content, "normalizer": normalizer}))
    found[name] = tokenization.load(path)
  return found


@pytest.mark.parametrize("has_control", [True, False])
@pytest.mark.parametrize("edit", ["plain", "nfkc", "lower", "llama"])
@hypothesis.given(texts=st.lists(CONTENTS, max_size=6))
def test_places_of_tokens_never_fall(fixtures, normalised, edit, has_control, texts):
  text = "<s>".join(texts)
  located = tokenization.load(fixtures / "tokenizer") if edit == "llama" else normalised[edit]
  (found,) = located.locate([text], has_control=has_control)
  begins = [found.begin(i) for i in range(len(found.ids))]
  assert begins == sorted(begins) and all(0 <= b < len(text) for b in begins)


# The same in transformers.

_TALKS = [
  messages("Who are you?", "A cat."),
  messages("Who are you? ", " A cat,\n\n\u732b\u3002 ", "<&'\"> sum\u00e9", "\U0001f469\u200d\U0001f4bb ok"),
  messages("a", "b", "c"),
  [{"role": "user", "content": "x " * 500}, {"role": "assistant", "content": "Yes.\n" * 300}],
]
_SYSTEM = [{"role": "system", "content": "Be brief."}]
# As Llama 3.1 and Qwen2.5 have them: dates, tests on tools, a default for the system's message, filters, namespaces.
_LLAMA31 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
_QWEN = """\
{%- set ns = namespace(count=0) %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.role == "nobody" %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{{- {"n": ns.count, "b": eos_token, "a": bos_token} | tojson(indent=1, sort_keys=true) }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
_THEIRS = {**{kind: KINDS[kind][0] for kind in KINDS}, "forgetful": FORGETFUL, "llama31": _LLAMA31, "qwen": _QWEN}


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("kind", _THEIRS)
def test_text_tokens_and_masks_are_those_of_transformers(directory, kind, in_file):
  transformers = pytest.importorskip("transformers")
  path = directory(_THEIRS[kind], KINDS.get(kind, ("", "<|im_end|>"))[1], BOS.get(kind, "<|begin_of_text|>"), in_file)
  theirs = transformers.AutoTokenizer.from_pretrained(str(path))
  loaded, now = tokenization.load(path), datetime.datetime.now()
  template = chat.Template(loaded.chat_template, tokens=loaded.named_tokens, now=now)
  ours = chat.Encoder(loaded, records="messages", train_on="all", now=now)
  for talk in _TALKS + [_SYSTEM + talk for talk in _TALKS if kind != "mistral"]:
    for prompts in False, True:
      expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompts)
      assert template.render(talk, add_generation_prompt=prompts) == expected
    expected = theirs.apply_chat_template(talk, return_dict=True)["input_ids"]
    (found,) = ours.encode([talk])
    assert found.ids == expected + [loaded.eos_id] * (expected[-1] != loaded.eos_id)
    # transformers loses every answer from one on that begins with a space, since trim_offsets gives the space to no token.
    if kind == "generation" and not any(m["content"][0] == " " for m in talk if is_answer(m)):
      expected = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
      (found,) = chat.Encoder(loaded, records="messages", train_on="answers", now=now).encode([talk])
      assert found.loss_mask[: len(expected)].tolist() == [bool(m) for m in expected]
