"""Which drafters a stream gets: the ones that are set, in the target's vocabulary or carried over to it."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_agent.drafting.base import Drafter, Source
from edge_agent.drafting.combined import CombinedDrafter, Trust
from edge_agent.drafting.copying import Copier
from edge_agent.drafting.llama import LlamaDrafter
from edge_agent.drafting.lookup import LookupCopier
from edge_agent.drafting.retrieval import SuffixIndex
from edge_agent.drafting.store import DocumentStore
from edge_agent.drafting.translated import TranslatedDrafter, Translation
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud
from shared.byte_tokens import ByteTokenizer
from shared.errors import InvalidSetting, VocabularyMismatch
from shared.messages import Open, Opened
from shared.vocab import TokenKind, Vocabulary, ids_to_mask


@dataclass(frozen=True, slots=True)
class StreamDrafter:
    """What drafts for one stream, and what its tokens are."""

    drafter: CombinedDrafter
    piece: Callable[[int], bytes]
    """Bytes of a target token; special ones have none."""
    masked_ids: frozenset[int]
    """The edge's ids that mean nothing to the target; without use where drafts are translated."""
    translated: bool


class Drafters:
    """Makes drafters by the settings, and keeps what streams can share: indexes, vocabularies, experience."""

    def __init__(
        self,
        edge: EdgeModel | None,
        names: Sequence[str] = (Source.MODEL.value,),
        *,
        store_folder: Path | None = None,
        remember_answers: bool = False,
    ) -> None:
        """
        Args:
            edge: needed where `names` has the model.
            names: of `Source`s.
            store_folder: needed where `names` has retrieval.
            remember_answers: the store may be empty still.
        """
        self.edge = edge
        self._names = {Source(name) for name in names}
        self._store_folder = store_folder
        self._remembers = remember_answers
        self._trust = Trust()
        self._indexes: dict[str, SuffixIndex] = {}
        self._targets: dict[str, Vocabulary] = {}

    def on(self, edge: EdgeModel) -> Drafters:
        """These drafters for a request that holds a slot of the edge model; what is shared stays shared."""
        drafters = copy.copy(self)
        drafters.edge = edge
        return drafters

    @asynccontextmanager
    async def reading(self, request: Open) -> AsyncIterator[None]:
        """Meanwhile the edge model reads the prompt's beginning, by its own chat template.

        A target of the same family has the same template: while the request travels, the work of the first
        draft is done.
        """
        chat = request.messages
        if self.edge is None or Source.MODEL not in self._names or not chat:
            yield
            return
        # All but the last token, which drafting evaluates.
        reading = asyncio.create_task(self.edge.read_beginning(self.edge.model.render_chat(chat)[:-1]))
        try:
            yield
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def for_stream(self, remote: Cloud, request: Open, opened: Opened) -> StreamDrafter:
        """Drafters of the target's tokens.

        Raises:
            InvalidSetting: retrieval is asked for, and nothing is stored for the vocabulary.
            CloudError: the vocabulary was needed and did not come.
        """
        sha256 = opened.vocabulary_sha256
        edge = self.edge
        if edge is None:
            target = await self._target(remote, sha256)
            drafter = self._combined(None, self._copiers(sha256))
            return StreamDrafter(drafter, _pieces(target), frozenset(), translated=False)
        if edge.model.vocabulary.sha256 == sha256:
            return self._same_vocabulary(edge, sha256, edge.model.piece)
        target = await self._target(remote, sha256)
        try:
            masked = ids_to_mask(edge.model.vocabulary, target)
        except VocabularyMismatch:
            return self._other_vocabulary(edge, target, request, opened)
        return self._same_vocabulary(edge, edge.model.vocabulary.sha256, _pieces(target), masked)

    @property
    def must_keep_pace(self) -> bool:
        """Whether the edge model can go back no further than it was loaded for."""
        return self.edge is not None and self.edge.model.has_recurrent_state

    def share_vocabulary(self, opened: Opened) -> bool:
        """Whether the edge model's tokens are the target's as they are, and it drafts at all."""
        return (
            self.edge is not None
            and Source.MODEL in self._names
            and self.edge.model.vocabulary.sha256 == opened.vocabulary_sha256
        )

    def remember(self, question: str, answer: str) -> None:
        """Add an answer to the store, if that is set. In mode `cloud` there is no vocabulary to store it in.

        Raises:
            InvalidSetting: the store cannot take it.
        """
        if not self._remembers or not answer.strip() or not (self.edge or self._targets):
            return
        if self.edge is not None:
            sha256 = self.edge.model.vocabulary.sha256
            token_ids = self.edge.model.tokenize(answer, special=False)
        else:
            sha256, target = next(iter(self._targets.items()))
            token_ids = ByteTokenizer(target).encode(answer.encode())
        assert self._store_folder is not None
        name = " ".join(question.split())[:80]
        DocumentStore(self._store_folder, sha256).add(name, token_ids, is_answer=True)
        self._indexes.pop(sha256, None)

    def _same_vocabulary(
        self,
        edge: EdgeModel,
        sha256: str,
        piece: Callable[[int], bytes],
        masked: frozenset[int] = frozenset(),
    ) -> StreamDrafter:
        drafter = self._combined(self._model(edge, masked), self._copiers(sha256), masked)
        return StreamDrafter(drafter, piece, masked, translated=False)

    def _other_vocabulary(
        self, edge: EdgeModel, target: Vocabulary, request: Open, opened: Opened
    ) -> StreamDrafter:
        """Lookup reads the target's tokens; what knows the edge's only is translated."""
        own = edge.model.vocabulary
        translation = Translation(own, target, lambda text: edge.model.tokenize(text, special=False))
        chat = request.messages
        inner = CombinedDrafter(self._retrieval(own.sha256), self._model(edge))
        translated = TranslatedDrafter(
            inner,
            translation,
            edge_prompt_ids=edge.model.render_chat(chat)
            if chat
            else translation.to_edge(opened.prompt_token_ids),
            edge_end_token_ids=edge.model.end_token_ids,
            num_prompt_tokens=len(opened.prompt_token_ids),
        )
        return StreamDrafter(
            self._combined(translated, self._lookup()), _pieces(target), frozenset(), translated=True
        )

    def _combined(
        self,
        model: Drafter | None,
        copiers: Sequence[tuple[Source, Copier]],
        masked: Collection[int] = (),
    ) -> CombinedDrafter:
        return CombinedDrafter(copiers, model, masked_ids=masked, trust=self._trust)

    def _model(self, edge: EdgeModel, masked: Collection[int] = ()) -> LlamaDrafter | None:
        return LlamaDrafter(edge, masked) if Source.MODEL in self._names else None

    def _copiers(self, vocabulary_sha256: str) -> list[tuple[Source, Copier]]:
        return [*self._lookup(), *self._retrieval(vocabulary_sha256)]

    def _lookup(self) -> list[tuple[Source, Copier]]:
        return [(Source.LOOKUP, LookupCopier())] if Source.LOOKUP in self._names else []

    def _retrieval(self, vocabulary_sha256: str) -> list[tuple[Source, Copier]]:
        if Source.RETRIEVAL not in self._names:
            return []
        if vocabulary_sha256 not in self._indexes:
            assert self._store_folder is not None
            documents = DocumentStore(self._store_folder, vocabulary_sha256).token_ids()
            if not documents and not self._remembers:
                raise InvalidSetting(
                    "nothing is stored for this model's vocabulary; add documents with `duet store add FILE`,"
                    " or leave retrieval out of drafters"
                )
            self._indexes[vocabulary_sha256] = SuffixIndex(documents)
        return [(Source.RETRIEVAL, self._indexes[vocabulary_sha256])]

    async def _target(self, remote: Cloud, vocabulary_sha256: str) -> Vocabulary:
        if vocabulary_sha256 not in self._targets:
            self._targets[vocabulary_sha256] = (await remote.describe()).vocabulary
        return self._targets[vocabulary_sha256]


def _pieces(vocabulary: Vocabulary) -> Callable[[int], bytes]:
    def piece(token_id: int) -> bytes:
        special = vocabulary.kinds[token_id] is TokenKind.SPECIAL
        return b"" if special else vocabulary.pieces[token_id]

    return piece
