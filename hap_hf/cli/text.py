"""Rows of text as samples of a model."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from hap_hf.cli.data import column
from hap_hf.cli.labels import classes_of
from hap_hf.errors import ConfigError

IGNORED = -100
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
)
TEXTS = ("text", "sentence", "content", "review")
LABELS = ("label", "labels", "target")
TAGS = ("ner_tags", "pos_tags", "tags", "labels")
QUESTIONS = ("question", "context", "answers")

Sample = dict[str, Any]


def text_columns(rows: Any, given: Sequence[str]) -> tuple[str, ...]:
    """Return the one or two columns with text.

    Args:
        rows: Rows of a dataset.
        given: Names that the user gave.

    Returns:
        The names.

    Raises:
        ConfigError: If they are not there, or more than two.
    """
    if len(given) > 2:
        raise ConfigError(f"expected one column of text, or two of a pair, got {list(given)}")
    if given:
        return tuple(column(rows, name, (), "text") for name in given)
    for pair in PAIRS:
        if set(pair) <= set(rows.column_names):
            return pair
    return (column(rows, None, TEXTS, "text"),)


def classified(rows: Any, model: Any, tokenizer: Any, given: Any) -> list[Sample]:
    """Return a sample for each row of one or two texts and a label."""
    texts, label = text_columns(rows, given.text_column), column(rows, given.label_column, LABELS, "label")
    encoded = tokenizer(*(_strings(rows[name], name) for name in texts), truncation=True, max_length=given.max_length)
    class_of = classes_of(rows, label, model.config)
    return [{**_row(encoded, i), "labels": class_of(value)} for i, value in enumerate(rows[label])]


def tagged(rows: Any, model: Any, tokenizer: Any, given: Any) -> list[Sample]:
    """Return a sample for each row of words and tags; a word's tag is that of its first token."""
    words = column(rows, given.text_column[0] if given.text_column else None, ("tokens", "words"), "text")
    tags = column(rows, given.label_column, TAGS, "label")
    read = [_strings(row, words, "a list of words") for row in rows[words]]
    encoded = tokenizer(read, is_split_into_words=True, truncation=True, max_length=given.max_length)
    samples, class_of = [], classes_of(rows, tags, model.config)
    for i, values in enumerate(rows[tags]):
        if not isinstance(values, list) or len(values) != len(read[i]):
            raise ConfigError(
                f"expected a tag in column {tags!r} for each word in column {words!r}, got {values!r} for {read[i]!r}"
            )
        places = encoded.word_ids(i)
        labels = [
            IGNORED if place is None or place == before else class_of(values[place])
            for before, place in zip([None, *places], places, strict=False)
        ]
        samples.append({**_row(encoded, i), "labels": labels})
    return samples


def answered(rows: Any, model: Any, tokenizer: Any, given: Any) -> list[Sample]:
    """Return a sample for each row of a question, a context and answers; one that was cut off is the first token."""
    if not set(QUESTIONS) <= set(rows.column_names):
        raise ConfigError(
            f"expected the columns {', '.join(QUESTIONS)}, as in SQuAD, got {list(rows.column_names)}; rename those of "
            "the data"
        )
    questions, contexts = (_strings(rows[name], name) for name in QUESTIONS[:2])
    try:
        encoded = tokenizer(
            questions, contexts, truncation="only_second", max_length=given.max_length, return_offsets_mapping=True
        )
    except Exception as error:  # which is all that tokenizers says of it
        raise ConfigError(
            f"a question leaves no room for its context in {given.max_length} tokens ({error}); raise --max-length"
        ) from error
    offsets = encoded.pop("offset_mapping")
    samples = []
    for i, answer in enumerate(rows["answers"]):
        first, last = 0, 0
        if (span := _span(answer)) is not None:
            start, end = span
            inside = [
                token
                for token, (low, high) in enumerate(offsets[i])
                if encoded.sequence_ids(i)[token] == 1 and low < end and high > start
            ]
            # Cut off in part would be another answer.
            if inside and offsets[i][inside[-1]][1] >= end:
                first, last = inside[0], inside[-1]
        samples.append({**_row(encoded, i), "start_positions": first, "end_positions": last})
    return samples


def continued(rows: Any, model: Any, tokenizer: Any, given: Any) -> list[Sample]:
    """Return blocks of ``max_length`` tokens of all texts, one after the other; what is left at the end is dropped."""
    (text,) = text_columns(rows, given.text_column[:1])
    length = given.max_length or 128
    some = _strings([t for t in rows[text] if t not in {None, ""}], text)
    ids = list(chain.from_iterable(tokenizer(some)["input_ids"])) if some else []
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if not blocks:
        raise ConfigError(f"the data has {len(ids)} tokens, fewer than one block of {length}; lower --max-length")
    return [{"input_ids": block, "attention_mask": [1] * length, "labels": list(block)} for block in blocks]


def _span(answer: Any) -> tuple[int, int] | None:
    """Return where the first answer begins and ends in its context; None where there is none."""
    try:
        texts, starts = answer["text"], answer["answer_start"]
        if not len(texts) and not len(starts):
            return None
        text, start = texts[0], starts[0]
        right = isinstance(texts, list) and isinstance(text, str) and isinstance(start, int)
    except (TypeError, KeyError, IndexError):
        right = False
    if not right:
        raise ConfigError(
            "expected answers as in SQuAD, {'text': ['Paris'], 'answer_start': [12]}, got " + repr(answer)[:80]
        )
    return start, start + len(text)


def _strings(values: Any, name: str, what: str = "a text") -> list[str]:
    """Return the values of a column, or of one row of it, as strings."""
    several = isinstance(values, Iterable) and not isinstance(values, (str, Mapping))
    found: list[Any] = list(values) if several else [[values]]
    other = [value for value in found if not isinstance(value, str)]
    if other:
        raise ConfigError(
            f"expected {what} in each row of column {name!r}, got {str(other[0])[:60]}; drop or mend such rows, or "
            "take another column"
        )
    return found


def _row(encoded: Any, index: int) -> Sample:
    return {name: values[index] for name, values in encoded.items()}
