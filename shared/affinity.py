"""Which streams belong together, for balancers that keep them on one replica."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice

from shared.messages import Message

_FIRST_TOKENS = 64


def session_key(prompt: Sequence[Message | int], salt: bytes, attempt: int = 0) -> str:
    """A name for the chat that a prompt continues: the same in all of its turns, 16 hexadecimal digits.

    Args:
        prompt: a chat, known by what it begins with, up to its first question; or token ids.
        salt: of this process, at most 64 bytes, so that the name tells nobody what was asked.
        attempt: how often the stream was refused where its name led; another number leads elsewhere.

    >>> chat = [Message("user", "1"), Message("assistant", "2"), Message("user", "3")]
    >>> session_key(chat, b"s") == session_key(chat[:1], b"s")
    True
    >>> session_key(chat, b"s") == session_key(chat, b"s", attempt=1)
    False
    """
    digest = blake2b(key=salt, digest_size=8)
    for part in _beginning(prompt):
        digest.update(repr(part).encode())
    digest.update(attempt.to_bytes(4, "little"))
    return digest.hexdigest()


def _beginning(prompt: Sequence[Message | int]) -> Sequence[Message | int]:
    for i, part in enumerate(prompt):
        if isinstance(part, Message) and part.role == "user":
            return prompt[: i + 1]
    return list(islice(prompt, _FIRST_TOKENS))
