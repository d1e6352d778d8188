"""Tokens as text, in any script: a token may be a piece of a character, and a character never comes in pieces."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex

# What stands for a piece of a character, as in decoded text.
MARK = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# A character as people see it: a letter with its vowel signs, an emoji with its modifiers, a flag of two letters.
_SEEN = regex.compile(r"\X")


def token_text(tokenizer: Any, token_id: int) -> str:
    """One token as text with its leading space; a piece of a character as :data:`MARK`, once in a row."""
    return "".join(character.text for character in _characters(token_bytes(tokenizer, token_id)))


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """What a token contributes to a text, in UTF-8; it may begin or end within a character."""
    piece: str = tokenizer.convert_ids_to_tokens([int(token_id)])[0] or ""
    # Decoding one SentencePiece token alone may drop the space that tells ' day' from 'day'.
    if "▁" in piece:
        return piece.replace("▁", " ").encode()
    text = _decode(tokenizer, [int(token_id)])
    if text != piece and (match := _BYTE.fullmatch(piece)):
        return bytes([int(match[1], 16)])
    if MARK in text and MARK not in piece:
        value = _byte_values()
        # Of a tokenizer of another kind it cannot be told which bytes these are: the mark stays.
        if all(letter in value for letter in piece):
            return bytes(value[letter] for letter in piece)
    return text.encode("utf-8", "replace")


def split_text(
    tokenizer: Any, before: Sequence[int], token: int, after: Sequence[int]
) -> tuple[str, str, str]:
    """The text before, at and after a token, as it was written.

    A token that is a piece of a character stands for the whole character; one that begins with what modifies a
    character (a vowel sign, a skin tone) for that with its character. A piece whose other pieces are not among the
    tokens is :data:`MARK`; at either end, where a window cuts a character, it is left out.
    """
    # Decoding the whole and cutting it keeps the spaces that some decoders put between tokens.
    left, upto = _decode(tokenizer, before), _decode(tokenizer, [*before, token])
    whole = _decode(tokenizer, [*before, token, *after])
    if upto.startswith(left) and whole.startswith(upto) and MARK not in whole:
        start, end = len(left), len(upto)
    else:
        pieces = [b"".join(token_bytes(tokenizer, i) for i in part) for part in (before, [token], after)]
        # Some decoders take the space in front of the first word away, as if it were none of the text's.
        if pieces[0].startswith(b" ") and not whole.startswith(" "):
            pieces[0] = pieces[0][1:]
        whole, start, end = _place(*pieces)
    if start < end:
        start, end = _with_its_character(whole, start, end)
    return whole[:start], whole[start:end], whole[end:]


@dataclass(frozen=True)
class _Character:
    """A character and its place among the bytes; :data:`MARK` for bytes that are none, together."""

    text: str
    begin: int
    end: int
    whole: bool


def _characters(raw: bytes) -> list[_Character]:
    found: list[_Character] = []
    begin = 0
    while begin < len(raw):
        for end in range(begin + 1, min(begin + 4, len(raw)) + 1):
            try:
                found.append(_Character(raw[begin:end].decode(), begin, end, True))
                break
            except UnicodeDecodeError:
                continue
        else:
            end = begin + 1
            if found and not found[-1].whole:
                found[-1] = _Character(MARK, found[-1].begin, end, False)
            else:
                found.append(_Character(MARK, begin, end, False))
        begin = end
    return found


def _place(before: bytes, token: bytes, after: bytes) -> tuple[str, int, int]:
    """The text, and from which to which of its characters the token goes."""
    first, last = len(before), len(before) + len(token)
    characters = _characters(before + token + after)
    while characters and not characters[0].whole and characters[0].end <= first:
        del characters[0]
    while characters and not characters[-1].whole and characters[-1].begin >= last:
        del characters[-1]
    start = sum(character.end <= first for character in characters)
    end = sum(character.begin < last for character in characters)
    return "".join(character.text for character in characters), start, end


def _with_its_character(text: str, start: int, end: int) -> tuple[int, int]:
    """The same span, or where it begins within a character as people see it, from that character's first part on."""
    for match in _SEEN.finditer(text):
        if match.start() < start < match.end() and match[0] != "\r\n":
            return match.start(), max(end, match.end())
        if match.end() >= start:
            break
    return start, end


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text


@functools.cache
def _byte_values() -> dict[str, int]:
    """The byte that each letter of a byte-level token stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: value for value, letter in bytes_to_unicode().items()}
