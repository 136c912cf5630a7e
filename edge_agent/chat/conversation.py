"""The messages of one chat. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shared.messages import Message


@dataclass(frozen=True, slots=True)
class Conversation:
    system: str | None = None
    messages: tuple[Message, ...] = ()
    """Of user and assistant in turn."""

    def asking(self, question: str) -> list[Message]:
        """What a model is given to answer the question."""
        system = [] if self.system is None else [Message("system", self.system)]
        return [*system, *self.messages, Message("user", question)]

    def answered(self, question: str, answer: str) -> Conversation:
        turn = (Message("user", question), Message("assistant", answer))
        return replace(self, messages=(*self.messages, *turn))

    @property
    def num_turns(self) -> int:
        return sum(message.role == "user" for message in self.messages)
