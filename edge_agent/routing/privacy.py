"""What must not leave the device: the user's patterns, secrets (detect-secrets) and personal data.

Numbers are checked by their check digits (python-stdnum) and by the national plans (phonenumbers), so
that a sum in a question is rarely taken for an account. Nothing here talks to a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import phonenumbers
from detect_secrets.core import scan
from detect_secrets.settings import transient_settings
from stdnum import iban, luhn
from stdnum.us import ssn

from shared.errors import InvalidSetting
from shared.messages import Message

_SECRET_PLUGINS = (
    *("ArtifactoryDetector", "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector"),
    *("CloudantDetector", "DiscordBotTokenDetector", "GitHubTokenDetector", "GitLabTokenDetector"),
    *("IbmCloudIamDetector", "IbmCosHmacDetector", "JwtTokenDetector", "KeywordDetector"),
    *("MailchimpDetector", "NpmDetector", "OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector"),
    *("SendGridDetector", "SlackDetector", "SoftlayerDetector", "SquareOAuthDetector", "StripeDetector"),
    *("TelegramBotTokenDetector", "TwilioKeyDetector"),
)
"""All of detect-secrets but its entropy and IP detectors, which take ordinary text for secrets."""

_SPOKEN_SECRET = re.compile(
    r"\b(?:password|passphrase|passcode|pin|api[ _-]?key|secret[ _-]?key|access[ _-]?token)\b"
    r"\s*(?:is|=|:)\s*[\"']?(?=\S*\d)\S{4,}",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"\b[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}\b")
_CARD = re.compile(r"\b\d(?:[ -]?\d){12,18}\b")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
_SSN = re.compile(r"\b\d{3}-\d{2}-\d{4}\b")


class PrivacyRule:
    """Says why a chat is private, if it is."""

    def __init__(self, patterns: Sequence[str], *, detect: bool) -> None:
        """
        Args:
            patterns: regular expressions; a chat that any of them matches is private.
            detect: look for secrets and personal data too.
        Raises:
            InvalidSetting: a pattern is not a regular expression.
        """
        self._detect = detect
        self._patterns = []
        for pattern in patterns:
            try:
                self._patterns.append(re.compile(pattern))
            except re.error as error:
                raise InvalidSetting(
                    f"private_patterns holds {pattern!r}, which is not a regular expression: {error}"
                ) from None

    def reason(self, messages: Sequence[Message], *, asked: bool = False) -> str | None:
        """The first reason to keep the chat here, in words without its content; None where there is none.

        Args:
            asked: the user said so (`--private`).
        """
        if asked:
            return "you said so"
        return next((why for message in messages for why in self._found(message.content)), None)

    def _found(self, text: str) -> Iterator[str]:
        for number, pattern in enumerate(self._patterns, start=1):
            if pattern.search(text):
                yield f"it matches pattern {number} of private_patterns"
        if self._detect:
            yield from _secrets(text)
            yield from _personal_data(text)


def _secrets(text: str) -> Iterator[str]:
    if _SPOKEN_SECRET.search(text):
        yield "it holds a secret (password or key)"
    with transient_settings({"plugins_used": [{"name": name} for name in _SECRET_PLUGINS]}):
        for line in text.splitlines():
            for secret in scan.scan_line(line):
                yield f"it holds a secret ({secret.type})"


def _personal_data(text: str) -> Iterator[str]:
    if _EMAIL.search(text):
        yield "it holds an e-mail address"
    if any(iban.is_valid(found) for found in _IBAN.findall(text)):
        yield "it holds a bank account (IBAN)"
    if any(luhn.is_valid(re.sub(r"\D", "", found)) for found in _CARD.findall(text)):
        yield "it holds a card number"
    if any(ssn.is_valid(found) for found in _SSN.findall(text)):
        yield "it holds a social security number"
    if phonenumbers.PhoneNumberMatcher(text, None).has_next():  # without a country: those that begin with +
        yield "it holds a telephone number"
