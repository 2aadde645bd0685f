"""Conversations -> token ids and a loss mask, by the tokenizer's own chat template.

Invariant: the text is what transformers' apply_chat_template renders of the same messages, and only the template writes
control tokens: a message that spells one is refused.

Where the answers lie in the text is said by the template's {% generation %} blocks; a template without them must continue
what it rendered: render(messages before an answer, with the generation prompt) is then a prefix of render(messages up to
the answer), the difference is the answer with its end of turn, and both are prefixes of the whole.
"""

import bisect
import datetime
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.store.spelling import Located, Spellings
from cpt_jax.store.tokenization import Tokenizer

_MAX_TURNS = 1000  # of a conversation whose answers are found by rendering it up to each of them
# What a template raises on messages that it was not written for.
_TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


class RenderError(Exception):
  """The template does not take the conversation; the text is the reason."""


class Rendered(NamedTuple):
  """A conversation as text."""

  text: str
  answers: list[tuple[int, int]]  # [start, end) in characters, ascending


class Encoded(NamedTuple):
  """A conversation as tokens."""

  ids: list[int]
  loss_mask: np.ndarray | None  # bool [num_ids]: the tokens that count in the loss; None where all do
  num_bytes: int  # UTF-8 bytes of the text that counts
  has_special_text: bool  # it spells a special token, which was encoded as plain text
  has_control_ids: bool  # its own text gave the id of EOS or BOS


def canonical(messages: list[dict[str, str]]) -> bytes:
  """One JSON text for equal conversations, whatever file and tokenizer: `[["user","Hi"],["assistant","Hello"]]`."""
  pairs = [[message["role"], message["content"]] for message in messages]
  return json.dumps(pairs, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


class Template:
  """A compiled chat template: the settings, functions and tags are those of transformers 5 (utils/chat_template_utils.py)."""

  def __init__(self, source: str, *, tokens: dict[str, str], now: datetime.datetime):
    """`tokens`: what the template may use by name, such as bos_token; `now`: the time it is told.
    Raises ConfigError: it is no jinja template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    try:
      self._template = environment.from_string(source)
      tree = environment.parse(source)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
      raise ConfigError(f"the chat template is broken: {error}; copy the tokenizer's files again") from None
    self._tokens = tokens
    self._tracker: Any = environment.extensions[_Generation.identifier]
    calls = tree.find_all(jinja2.nodes.ExtensionAttribute)
    self.marks_answers = any(call.identifier == _Generation.identifier for call in calls)
    # As transformers finds control tokens that are not marked as special: in what the template itself writes.
    literals = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    literals += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    self.literals = "\0".join(literals)

  def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    """The conversation as text. Raises RenderError: the template does not take it."""
    return self._render(messages, add_generation_prompt).text

  def render_answers(self, messages: list[dict[str, str]]) -> Rendered:
    """The conversation as text, and where the answers lie in it.
    Raises RenderError: the template does not take it, or does not say where its answers are."""
    whole = self._render(messages, False)
    if not any(message["role"] == "assistant" for message in messages):
      raise RenderError(f"no answer: none of its {len(messages)} messages has the role assistant")
    if self.marks_answers:
      return whole
    if len(messages) > _MAX_TURNS:
      raise RenderError(f"{len(messages)} messages, more than {_MAX_TURNS}; the template has no {{% generation %}} blocks")
    answers, end = [], 0
    for i, message in enumerate(messages):
      if message["role"] != "assistant":
        continue
      before = self.render(messages[:i], add_generation_prompt=True)
      upto = self.render(messages[: i + 1]) if i + 1 < len(messages) else whole.text
      if not (upto.startswith(before) and whole.text.startswith(upto) and end <= len(before) <= len(upto)):
        raise RenderError(
          f"the chat template renders what comes before message {i + 1} in another way once more messages follow, so where "
          "this answer lies is unknown; mark the answers in the template with {% generation %}, or use --train_on all"
        )
      end = len(upto)
      answers.append((len(before), end))
    return Rendered(whole.text, answers)

  def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> Rendered:
    pieces, tracker = [], self._tracker
    tracker.position, tracker.found = 0, []
    stream = self._template.generate(
      messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._tokens
    )
    try:
      for piece in stream:
        pieces.append(piece)
        tracker.position += len(piece)
    except _TEMPLATE_ERRORS as error:
      raise RenderError(f"the chat template does not take it: {str(error)[:200] or type(error).__name__}") from None
    text = "".join(pieces)
    answers = [(start, start + len(answer)) for start, answer in tracker.found]
    edges = [edge for answer in answers for edge in answer]
    if edges != sorted(edges) or any(not text.startswith(answer, start) for start, answer in tracker.found):
      raise RenderError("a {% generation %} block stands in a macro, a set block or another such block, so its place is unknown")
    return Rendered(text, answers)


class _Generation(jinja2.ext.Extension):
  """The tag {% generation %}: notes where the text of the block begins."""

  tags = {"generation"}  # noqa: RUF012 - jinja2 asks for it so
  position = 0  # characters rendered before what is being rendered

  def __init__(self, environment: jinja2.Environment):
    super().__init__(environment)
    self.found: list[tuple[int, str]] = []

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

  def note(self, caller: Any) -> str:
    text = caller()
    self.found.append((self.position, text))
    return text


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  # jinja2's own filter escapes HTML.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


class Encoder:
  """Encodes conversations with a tokenizer and its template; a prompt and its answer without a template, too."""

  def __init__(self, tokenizer: Tokenizer, *, records: str, train_on: str, now: datetime.datetime):
    """`records`: "messages" or "prompt"; `train_on`: "all" or "answers"; `now`: the time that the template is told.
    Raises ConfigError: the tokenizer has no chat template, or a broken one, or cannot say where its tokens are."""
    source, file = tokenizer.chat_template, tokenizer.path
    if not source and records == "messages":
      raise ConfigError(
        f"--records messages: {file.parent} has no chat template: neither chat_template.jinja nor a chat_template (of several, "
        "one named default) in tokenizer_config.json; add the file, or take the tokenizer of the model's instruction-tuned kin"
      )
    if (source or train_on == "answers") and not tokenizer.can_locate:
      raise ConfigError(
        f"{file}: a SentencePiece model alone does not make control tokens of a rendered chat, nor say which token lies where; "
        "convert it to a tokenizer.json with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
      )
    self._tokenizer = tokenizer
    self._has_mask = train_on == "answers"
    self._template = Template(source, tokens=tokenizer.named_tokens, now=now) if source else None
    literals = self._template.literals if self._template else ""
    plain = [token for token in tokenizer.added_tokens if token in literals and not token.isspace()]
    self._control = Spellings([*tokenizer.special_tokens, *plain])
    # An answer may hold tokens such as <think>, which are not marked as special because models write them.
    self._control_in_answers = Spellings(tokenizer.special_tokens)
    self._skeleton = functools.lru_cache(maxsize=4096)(self._make_skeleton)

  def encode(self, conversations: list[list[dict[str, str]]]) -> list[Encoded | RenderError]:
    """Each conversation as tokens, EOS last, or what is wrong with it."""
    rendered: list[Rendered | RenderError] = []
    for messages in conversations:
      try:
        rendered.append(self._render(messages) if self._template else _joined(messages))
      except RenderError as error:
        rendered.append(error)
    texts = [r.text for r in rendered if isinstance(r, Rendered)]
    if self._template or self._has_mask:
      found = self._tokenizer.locate(texts, has_control=self._template is not None, has_begins=self._has_mask)
    else:  # as plain texts, with any tokenizer
      found = [Located(ids, None) for ids in self._tokenizer.encode_contents(texts)]
    located = iter(found)
    encoded: list[Encoded | RenderError] = []
    for messages, r in zip(conversations, rendered, strict=True):
      try:
        encoded.append(self._finish(messages, r, next(located)) if isinstance(r, Rendered) else r)
      except RenderError as error:
        encoded.append(error)
    return encoded

  def _render(self, messages: list[dict[str, str]]) -> Rendered:
    assert self._template is not None
    for i, message in enumerate(messages, 1):
      spellings = self._control_in_answers if message["role"] == "assistant" else self._control
      token = spellings.first_in(message["content"])
      if token:
        raise RenderError(f"message {i} spells the control token {token!r}; remove it or write it in another way")
    return self._template.render_answers(messages) if self._has_mask else Rendered(self._template.render(messages), [])

  def _finish(self, messages: list[dict[str, str]], rendered: Rendered, located: Located) -> Encoded:
    ids, has_special_text, has_control_ids = located.ids, False, False
    prefix, suffix = self._tokenizer.surroundings()
    if not ids:
      raise RenderError("the chat template renders nothing of it")
    if self._template:
      special = [i for i in ids if i in self._tokenizer.special_ids]
      if special != self._skeleton(tuple((m["role"], bool(m["content"].strip())) for m in messages)):
        raise RenderError("a message's text becomes a control token once it is rendered and encoded; write it in another way")
      prefix, suffix = [], [] if ids[-1:] == suffix[-1:] else suffix[-1:]
    else:
      control = {self._tokenizer.eos_id, self._tokenizer.bos_id}
      has_special_text = self._tokenizer.has_special_text(rendered.text)
      has_control_ids = any(i in control for i in ids)
    mask, num_bytes = None, len(rendered.text.encode("utf-8"))
    if located.begin is not None:
      counts = loss_mask(len(ids), located.begin, rendered.answers)
      if not counts.any():
        raise RenderError("no token of it begins in an answer")
      ends_in_answer = messages[-1]["role"] == "assistant"
      mask = np.concatenate([np.zeros(len(prefix), bool), counts, np.full(len(suffix), ends_in_answer)])
      num_bytes = sum(len(rendered.text[start:end].encode("utf-8")) for start, end in rendered.answers)
    return Encoded([*prefix, *ids, *suffix], mask, num_bytes, has_special_text, has_control_ids)

  def _make_skeleton(self, turns: tuple[tuple[str, bool], ...]) -> list[int]:
    """The special ids of a conversation of such turns, in which nothing is said that could become one."""
    assert self._template is not None
    messages = [{"role": role, "content": "x" if says_something else ""} for role, says_something in turns]
    (located,) = self._tokenizer.locate([self._template.render(messages)], has_control=True, has_begins=False)
    return [i for i in located.ids if i in self._tokenizer.special_ids]


def _joined(messages: list[dict[str, str]]) -> Rendered:
  """A prompt and its answer, one behind the other."""
  prompt, answer = (message["content"] for message in messages)
  return Rendered(prompt + answer, [(len(prompt), len(prompt) + len(answer))])


def loss_mask(num_tokens: int, begin: Callable[[int], int], answers: list[tuple[int, int]]) -> np.ndarray:
  """Which tokens begin in an answer, bool [num_tokens]; tokens at 0, 4, 9 and answers [(4, 9)] -> `[False, True, False]`."""
  mask = np.zeros(num_tokens, bool)
  for start, end in answers:
    first, last = (bisect.bisect_left(range(num_tokens), edge, key=begin) for edge in (start, end))
    mask[first:last] = True
  return mask
