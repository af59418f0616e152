"""Prompts with their answers, as tokens of one family."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..answers.template import MemberPrompts
from ..api import FusedLlama
from ..errors import InvalidParameterError, require, shown
from ..system.jsonl import MAX_LINE_BYTES, parse_object, read_lines

Row: TypeAlias = tuple[str, Mapping[str, Any]]
"""A row of a file, after a few words that say where it stands."""
_MAX_WEIGHT = 1e38
_OF_ANSWER = frozenset({"role", "content", "name"})
_OF_PROMPT = ("tools", "functions", "tool_choice", "chat_template_kwargs")


@dataclass(frozen=True)
class Example:
    """One prompt and its answer.

    prompt, answer: token ids. The answer's last token ends it.
    text: the answer.
    weight: how much it counts in training.
    own: members that read it by a chat template of their own, each with its prompt.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    weight: float = 1.0
    own: tuple[tuple[str, tuple[int, ...]], ...] = ()


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines, checked. Raises InvalidParameterError."""
    try:
        with path.open("rb") as file:
            for line in read_lines(file):
                where = f"{path}:{line.number}"
                if line.content is None:
                    raise InvalidParameterError(f"{where}: has more than {MAX_LINE_BYTES >> 20} MiB")
                try:
                    row = parse_object(line.content)
                except ValueError as error:
                    raise InvalidParameterError(f"{where}: is {error}") from None
                _parts(row, where)
                _weight(row, where)
                yield where, row
    except OSError as error:
        raise InvalidParameterError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def by_task(rows: Iterable[Row], field: str) -> dict[str, list[Row]]:
    """The rows of each task, which their `field` names. Raises InvalidParameterError where it does not."""
    tasks: dict[str, list[Row]] = {}
    for where, row in rows:
        task: Any = row.get(field)
        require(isinstance(task, str) and task, f"{where}: the field {field!r} must name the task, in text")
        tasks.setdefault(task, []).append((where, row))
    require(tasks, "there are no examples")
    return tasks


def tokenized(llm: FusedLlama, rows: Iterable[Row], *, raw: bool, system: str | None) -> list[Example]:
    """Examples of rows {"prompt", "answer"}, {"messages", "answer"}, or {"messages"} that end with the answer.

    raw: whether prompts are taken as they are, without the chat template.
    system: a message that goes before messages that have none.

    Raises InvalidParameterError, which names the row, also for an example that exceeds the context.
    """
    require(not (raw and system), "a system prompt needs the chat template: leave out --raw or --system")
    examples = []
    for where, row in rows:
        prompt, answer = _parts(row, where)
        is_chat = not (raw and isinstance(prompt, str))
        if is_chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if system and messages[0].get("role") != "system":
                messages = [{"role": "system", "content": system}, *messages]
            try:
                tokens: MemberPrompts = llm.apply_chat_template(messages)
            except InvalidParameterError as error:
                raise InvalidParameterError(f"{where}: {error}") from error
        else:
            tokens = MemberPrompts(llm.tokenize(prompt) or [llm.first_token])
        answered = llm.tokenize_answer(answer, is_chat=is_chat)
        n_tokens = tokens.n_longest + len(answered) - 1
        require(n_tokens <= llm.n_ctx, f"{where}: has {n_tokens} tokens, more than the context of {llm.n_ctx}")
        own = tuple((name, tuple(prompt)) for name, prompt in tokens.own.items())
        examples.append(Example(tuple(tokens), tuple(answered), answer, _weight(row, where), own))
    return examples


def _parts(row: Mapping[str, Any], where: str) -> tuple[Any, str]:
    """The prompt, text or messages, and the answer of one row."""
    prompt, messages, answer = row.get("prompt"), row.get("messages"), row.get("answer")
    require((prompt is None) != (messages is None), f"{where}: needs either a prompt or messages")
    if messages is not None:
        is_list = isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages)
        require(is_list and messages, f"{where}: messages must be a list of objects with role and content")
        if answer is None:
            *messages, last = messages
            if last.get("role") != "assistant" or not messages:
                raise InvalidParameterError(f"{where}: the last message must be the assistant's answer to another")
            answer = last.get("content")
            _require_no_more(last, _OF_ANSWER, f"{where}: of the last message")
        _require_no_more({name: row.get(name) for name in _OF_PROMPT}, (), f"{where}: of a row")
    elif not isinstance(prompt, str):
        raise InvalidParameterError(f"{where}: prompt must be text")
    if not isinstance(answer, str):
        raise InvalidParameterError(f"{where}: the answer must be text")
    require(answer.strip(), f"{where}: the answer is empty")
    return (prompt if messages is None else messages), answer


def _require_no_more(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise InvalidParameterError for what would be left out of the prompt or the answer without a word."""
    for name, value in given.items():
        is_plain = name in known or not value or (name == "weight" and value == 1)
        require(is_plain, f"{where}, {shown(name)} cannot be learnt from; take it out of the row, or the row out")


def _weight(row: Mapping[str, Any], where: str) -> float:
    """How much the row counts in training, 1 by default."""
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 < weight <= _MAX_WEIGHT:
        raise InvalidParameterError(f"{where}: weight must be a number above 0")
    return float(weight)
