"""Obvious personal data in texts: found, counted, and replaced by its kind.

The patterns are those of datafog's regex engine, which takes any ten digits for a telephone number, any nine for a social security
number and any dotted quad for somebody's address (4.9). What its patterns find counts here only where its form leaves little doubt: cards
by Luhn's check digit, public IP addresses, telephone numbers with a plus, parentheses, hyphens or dots, security numbers with hyphens.
Dates, postal codes and names are not looked for. IBANs of all countries are found by their check digits (ISO 7064, mod 97).

Only the patterns are imported: datafog reports what its other modules are called for to a server.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from finetune_trainer.prepare.examples import Completion, Conversation, Example, Text

os.environ["DATAFOG_NO_TELEMETRY"] = "1"
from datafog.processing.text_processing.regex_annotator import RegexAnnotator

NOT_TEXT = frozenset({"role", "type", "id", "tool_call_id"})
"""Fields of a message, and of a call in it, whose values are words of the format. Arguments may have fields of these names: those are text."""
LONGEST_LOCAL_PART, LONGEST_DOMAIN = 64, 255
"""Of an address (RFC 5321). Only so far around an @ datafog's pattern is tried: on a long text without blanks it takes quadratic time."""

_DIGIT = re.compile(r"\d")
_SEVEN_DIGITS = re.compile(r"\d(?:[\s().-]{0,2}\d){6}")
_DOTTED = re.compile(r"\d\.\d{1,3}\.\d")
_DECIMAL = re.compile(r"\+\d+\.\d+")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_PATTERNS: dict[str, re.Pattern[str]] = {**RegexAnnotator().patterns, "IBAN": _IBAN}


def redacted(text: str, found: Counter[str]) -> str:
    """The text with ``[EMAIL]`` and the like in the place of what was found, which is counted by kind in ``found``."""
    for kind in _possible(text):
        pieces, position = [], 0
        for start, end in _matches(kind, text):
            if start >= position and _LIKELY.get(kind, _always)(text[start:end]):
                found[kind] += 1
                pieces += [text[position:start], f"[{kind}]"]
                position = end
        if pieces:
            text = "".join([*pieces, text[position:]])
    return text


def redacted_example(example: Example, found: Counter[str]) -> Example:
    """The example with every text of it redacted: contents, names and arguments of calls, descriptions of tools."""
    match example:
        case Conversation():
            messages = [_redacted_message(message, found) for message in example.messages]
            return replace(example, messages=messages, tools=_redacted_value(example.tools, found))
        case Completion():
            return Completion(redacted(example.prompt, found), redacted(example.completion, found))
        case Text():
            return Text(redacted(example.text, found))
    return example


def _redacted_message(message: dict[str, Any], found: Counter[str]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    words, rest = _words_and_rest(message)
    if isinstance(calls, list):
        del rest["tool_calls"]
        words["tool_calls"] = [_redacted_call(call, found) for call in calls]
    return words | _redacted_fields(rest, found)


def _redacted_call(call: Any, found: Counter[str]) -> Any:
    if not isinstance(call, dict):
        return _redacted_value(call, found)
    words, rest = _words_and_rest(call)
    return words | _redacted_fields(rest, found)


def _words_and_rest(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    words = {k: v for k, v in fields.items() if k in NOT_TEXT and isinstance(v, str)}
    return words, {k: v for k, v in fields.items() if k not in words}


def _redacted_value(value: Any, found: Counter[str]) -> Any:
    if isinstance(value, str):
        return redacted(value, found)
    if isinstance(value, list):
        return [_redacted_value(item, found) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        written = str(value)
        clean = redacted(written, found)
        return value if clean == written else clean
    return _redacted_fields(value, found) if isinstance(value, dict) else value


def _redacted_fields(fields: dict[str, Any], found: Counter[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in fields.items():
        name = clean = redacted(key, found)
        while name in result:  # two keys that were different things of one kind
            name = f"{name} {clean}"
        result[name] = _redacted_value(item, found)
    return result


def _possible(text: str) -> list[str]:
    """The kinds whose patterns, which are slow, are worth trying on a text, in an order in which no kind is taken for a part of another."""
    kinds = ["EMAIL"] if "@" in text else []
    if _DIGIT.search(text):
        many = _SEVEN_DIGITS.search(text) is not None
        kinds += ["IBAN", "CREDIT_CARD", "SSN"] if many else []
        kinds += ["IP_ADDRESS"] if _DOTTED.search(text) else []
        kinds += ["PHONE"] if many else []
    return kinds


def _matches(kind: str, text: str) -> Iterator[tuple[int, int]]:
    pattern = _PATTERNS[kind]
    if kind != "EMAIL":
        yield from (match.span() for match in pattern.finditer(text))
        return
    at = text.find("@")
    while at >= 0:
        # One more on each side, so that the pattern sees what stands around.
        begin, end = max(0, at - LONGEST_LOCAL_PART - 1), at + LONGEST_DOMAIN + 2
        match = next((m for m in pattern.finditer(text, begin, end) if m.start() < at < m.end()), None)
        if match is not None:
            yield match.span()
        at = text.find("@", max(at + 1, match.end() if match is not None else 0))


def _always(_: str) -> bool:
    return True


def _digits(text: str) -> str:
    return "".join(c for c in text if c.isdigit())


def _is_card(text: str) -> bool:
    """Luhn's check digit (ISO/IEC 7812-1)."""
    digits = [int(c) for c in reversed(_digits(text))]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)) % 10 == 0


def _is_iban(text: str) -> bool:
    plain = text.replace(" ", "")
    return len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _is_public(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:  # the pattern takes 1.02.03.04 for an address, and digits of any script
        return False


def _is_phone(text: str) -> bool:
    if text.startswith("+"):
        return 9 <= len(_digits(text)) <= 15 and _DECIMAL.fullmatch(text) is None
    return text.startswith("(") or len(re.findall(r"[-.]", text)) >= 2


_LIKELY: dict[str, Callable[[str], bool]] = {
    "CREDIT_CARD": _is_card,
    "IBAN": _is_iban,
    "SSN": lambda text: "-" in text,
    "IP_ADDRESS": _is_public,
    "PHONE": _is_phone,
}
