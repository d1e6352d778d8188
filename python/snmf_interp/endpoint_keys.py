"""Keys of an endpoint: checked before they are sent, and taken out of every text that is kept or shown."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit, urlunsplit

# What stands in a text where a key was.
HIDDEN = "***"
# A shorter key may be a word of any text ("EMPTY", "ollama"): it counts only where it stands alone, and only in
# messages, for in a model's answer it would be the model's own word.
_LONG = 8
# Arguments of the openai package that are no part of the question: they may hold keys, and go into no file.
TRANSPORT = ("extra_headers", "extra_query")
# Fields of a request's body whose values are keys.
_KEY_NAME = re.compile(r"(?i)(api[-_]?key|(access|auth)[-_]?token|secret|password|authorization)$")


def checked_key(name: str, key: str) -> str:
    """A key without the space around it.

    Args:
        name: of the argument or variable that it came by.
        key: as it came; line ends of a file that it was copied from may stand around it.

    Raises:
        ValueError: no header can carry it. The message does not quote it.
    """
    key = key.strip()
    wrong = next((place for place, letter in enumerate(key, 1) if not " " <= letter <= "~"), None)
    if wrong is not None:
        raise ValueError(
            f"{name}: wanted printable ASCII characters, which a header can carry, got another as character {wrong} "
            f"of {len(key)}; copy the key again"
        )
    return key


@dataclass(frozen=True)
class Address:
    """A base URL, taken apart.

    Attributes:
        url: what requests are sent to, with user and password where it has some, and without a query.
        query: sent with every request.
        shown: the same in messages and files, without what may be a key.
        secrets: what may be a key: user, password, and the values of the query.
    """

    url: str
    query: dict[str, str]
    shown: str
    secrets: tuple[str, ...]

    @classmethod
    def of(cls, given: str) -> Address:
        """Read a base URL.

        Raises:
            ValueError: it is none. The message quotes nothing of it that may be a key.
        """
        # A host in brackets or a port that is no number quotes itself in the error, and with it the password.
        try:
            parts = urlsplit(given.strip())
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(
                "base_url: wanted an address such as http://localhost:8000/v1, got something without http(s)://, a "
                "host, or a port that is a number; write special characters of a password as %40 and the like"
            )
        user, _, host = parts.netloc.rpartition("@")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        shown = "&".join(f"{name}={HIDDEN}" for name in query)
        secrets = [unquote(part) for part in user.split(":", 1)] + list(query.values())
        if user:
            secrets.append(base64.b64encode(unquote(user).encode()).decode())
        return cls(
            urlunsplit((parts.scheme, parts.netloc, parts.path, "", "")),
            query,
            urlunsplit((parts.scheme, host, parts.path, shown, "")),
            tuple(filter(None, secrets)),
        )


class Secrets:
    """Takes keys out of texts, in any of the spellings in which messages quote them."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        spellings = {form for value in values if value.strip() for form in _spellings(value.strip())}
        # The longest first: one key may be a part of another.
        ordered = sorted(spellings, key=lambda form: (-len(form), form))
        self._anywhere = _pattern(re.escape(form) for form in ordered if len(form) >= _LONG)
        self._alone = _pattern(rf"(?<!\w){re.escape(form)}(?!\w)" for form in ordered if len(form) < _LONG)

    def hide(self, text: str) -> str:
        """A message without the keys."""
        for pattern in (self._anywhere, self._alone):
            text = text if pattern is None else pattern.sub(HIDDEN, text)
        return text

    def hide_in(self, value: Any) -> Any:
        """JSON values without the keys, but for those so short that they may be a word of an answer."""
        if self._anywhere is None:
            return value
        if isinstance(value, str):
            return self._anywhere.sub(HIDDEN, value)
        if isinstance(value, Mapping):
            return {self.hide_in(name): self.hide_in(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_in(part) for part in value]
        return value


def keys_in(fields: Mapping[str, Any]) -> Iterator[str]:
    """What may be a key among the fields of a request: all of :data:`TRANSPORT`, and by its name at any depth."""
    for name, value in fields.items():
        if name in TRANSPORT or _KEY_NAME.search(name):
            yield from _texts(value)
        elif isinstance(value, Mapping):
            yield from keys_in(value)


def _texts(value: Any) -> Iterator[str]:
    """Every text among JSON values; of one of several words, such as ``Bearer …``, each word too."""
    if isinstance(value, str):
        yield from {value, *value.split()}
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _spellings(value: str) -> set[str]:
    """A key as it is, and as addresses, Python and JSON write it."""
    return {value, quote(value, safe=""), quote_plus(value), repr(value)[1:-1], json.dumps(value)[1:-1]}


def _pattern(alternatives: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(alternatives)
    return re.compile(joined) if joined else None
