"""The text side of a Hugging Face model: chat template, vocabulary and ends, without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from shared.errors import InvalidRequest, ModelFileInvalid, ModelUnsupported
from shared.messages import Message
from shared.vocab import TokenKind, Vocabulary


class HfText:
    """Tokenizer and chat template of one model, in this process."""

    def __init__(self, tokenizer: Any, name: str, *, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        """
        Args:
            tokenizer: a fast tokenizer of transformers.
            vocab_size: rows of the model's head, padding included.
        """
        self.name = name
        self.end_token_ids = end_token_ids
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    @classmethod
    def load(cls, model: str, name: str, *, vocab_size: int, trust_remote_code: bool = False) -> HfText:
        """
        Args:
            model: a folder, or the id of a repository.
            name: what people call the model.
        Raises:
            ModelFileInvalid: there is no tokenizer that transformers can read.
            ModelUnsupported: the model has no chat template or no end.
        """
        from transformers import AutoTokenizer  # seconds, which only this target should cost

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ModelFileInvalid(f"cannot read the tokenizer of {model}: {_one_line(error)}") from None
        if not tokenizer.chat_template:
            raise ModelUnsupported(f"{name} has no chat template; choose an instruction-tuned model")
        ends = _generation_ends(model) | {tokenizer.eos_token_id} - {None}
        if not ends:
            raise ModelUnsupported(f"{name} names no token that ends a text (eos_token_id)")
        return cls(tokenizer, name, vocab_size=vocab_size, end_token_ids=frozenset(ends))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """[vocab_size] pieces and kinds, as a GGUF file of the same model has them.

        What the tokenizer marks as special is SPECIAL; other tokens that were added count as text.
        """
        from xgrammar import TokenizerInfo  # vLLM brings it; it knows how each family encodes bytes

        info = TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=self._vocab_size)
        pieces = list(info.decoded_vocab)
        kinds = [TokenKind.PADDING] * self._vocab_size
        for token_id in self._tokenizer.get_vocab().values():
            kinds[token_id] = TokenKind.TEXT
        for token_id, added in self._tokenizer.added_tokens_decoder.items():
            pieces[token_id] = added.content.encode()
            kinds[token_id] = TokenKind.SPECIAL if added.special else TokenKind.TEXT
        for token_id, kind in enumerate(kinds):
            if kind is TokenKind.PADDING:
                pieces[token_id] = b""
        return Vocabulary(self.name, pieces, kinds)

    def piece(self, token_id: int) -> bytes:
        vocabulary = self.vocabulary
        return vocabulary.pieces[token_id] if vocabulary.kinds[token_id] is TokenKind.TEXT else b""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, in which the names of special tokens are plain text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the chat, up to where the answer begins.

        Raises:
            InvalidRequest: the template refuses the messages, for example an unknown role.
        """
        raw = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(raw, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise whatever they like
            raise InvalidRequest(f"{self.name}'s chat template refuses these messages: {error}") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def _generation_ends(model: str) -> set[int]:
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # not every model has the file
        return set()
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
