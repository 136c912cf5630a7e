"""What counts as private."""

from __future__ import annotations

import pytest

from edge_agent.routing.privacy import PrivacyRule
from shared.errors import InvalidSetting
from shared.messages import Message


def reason(text, *patterns, detect=True, asked=False):
    return PrivacyRule(patterns, detect=detect).reason([Message("user", text)], asked=asked)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Why is AKIAIOSFODNN7EXAMPLE refused?", "AWS"),
        ("push with ghp_" + "a1B2" * 9, "GitHub"),
        ("-----BEGIN RSA PRIVATE KEY-----", "Private Key"),
        ("clone https://bob:s3cret@example.org/x", "Basic Auth"),
        ("first line\npassword = 'hunter2hunter'", "secret"),
        ("my password is hunter2, is that safe?", "secret"),
        ("Write to jane.doe@example.com about it", "e-mail"),
        ("my card is 4111 1111 1111 1111", "card number"),
        ("transfer to DE89 3704 0044 0532 0130 00", "IBAN"),
        ("SSN 536-90-4399", "social security"),
        ("call me at +49 170 1234567", "telephone"),
    ],
)
def test_secrets_and_personal_data_are_private(text, what):
    found = reason(text)
    assert what in found
    assert not any(word in found for word in text.split() if len(word) > 8)  # the reason may be shown
    assert reason(text, detect=False) is None


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "What is a password manager?",
        "Is a password hash a secret?",
        "What is 4111111111111112 + 123456789012345?",
        "Convert 192.168.0.1 to binary.",
        "The year 1984-05-06 was a Sunday?",
        "Decorate with @dataclass in Python.",
        "What is the sum of 536 90 4399?",
    ],
)
def test_ordinary_questions_are_not(text):
    assert reason(text) is None


def test_a_pattern_of_the_user_counts_and_is_named_without_its_match():
    assert reason("About project Nightjar", "Kestrel", r"(?i)nightjar") == (
        "it matches pattern 2 of private_patterns"
    )
    assert reason("About project Heron", "Kestrel") is None


def test_the_whole_chat_is_looked_at():
    chat = [Message("system", "The key is AKIAIOSFODNN7EXAMPLE"), Message("user", "Hello")]
    assert PrivacyRule((), detect=True).reason(chat) is not None


def test_the_user_may_say_so():
    assert reason("Hello", detect=False, asked=True) == "you said so"


def test_a_broken_pattern_is_named():
    with pytest.raises(InvalidSetting, match=r"private_patterns holds '\(a', which is not a regular"):
        PrivacyRule(["(a"], detect=True)
