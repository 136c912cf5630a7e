"""Mode `guide`: the target begins the answer, the edge model finishes it.

The guidance of GKT (Yao et al. 2024, arXiv:2405.19635) is the beginning of the target's own answer, cut off
after a number of tokens. It is an ordinary short stream of the target, batched there with all others, and
is handed over as text where the vocabularies differ. Nothing is verified afterwards: what follows the
guidance is the edge model's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from edge_agent.drafting.translated import tokens_of
from edge_agent.edge_model import EdgeModel
from edge_agent.modes import edge_prompt, written_on
from edge_agent.resume import TargetStreams
from edge_agent.steps import Prompted, Step
from shared.byte_tokens import ByteTokenizer
from shared.errors import CloudError
from shared.events import Notice, Token
from shared.messages import FinishReason, Open, Opened, Policy
from shared.resumption import OnOutage, is_resumable


async def guide(edge: EdgeModel, streams: TargetStreams, request: Open) -> AsyncGenerator[Step, None]:
    """At most `guidance_tokens` of the target's answer, then the edge's own; the limit counts both.

    A target that ends its answer within the guidance leaves nothing to do. One that is lost meanwhile is
    waited for, or not, as `on_outage` says; where the edge is to continue, it does with what is there.

    Raises:
        PromptTooLong: for the edge or for the target.
        CloudError: the guidance cannot begin, or not go on in time.
    """
    prompt = await edge_prompt(edge, request)
    guidance: list[Token] = []
    opened: Opened | None = None
    reason: FinishReason | None = None
    limit = min(streams.config.guidance_tokens, request.max_tokens or streams.config.guidance_tokens)
    try:
        async with streams.drafters.reading(request), aclosing(_beginning(streams, request, limit)) as steps:
            async for step in steps:
                if isinstance(step, FinishReason):
                    reason = step
                    continue
                if isinstance(step, Prompted):
                    opened = step.opened
                elif isinstance(step, Token):
                    if len(guidance) == limit:  # a service that does not keep to what was asked
                        break
                    guidance.append(step)
                yield step
    except CloudError as error:
        if opened is None or streams.config.on_outage is not OnOutage.CONTINUE or not is_resumable(error):
            raise
        streams.observed.lost(error, len(guidance))
        yield Notice(f"the edge model goes on after {len(guidance)} of {limit} tokens of guidance: {error}")
    assert opened is not None, "a stream is opened before it ends"
    if reason is FinishReason.STOP or (guidance and guidance[-1].id in opened.end_token_ids):
        yield FinishReason.STOP
        return
    begun = await asyncio.to_thread(_in_edge_tokens, edge, opened, guidance)
    async with aclosing(written_on(edge, request, prompt, begun, start=len(guidance))) as rest:
        async for step in rest:
            yield step


def _beginning(streams: TargetStreams, request: Open, limit: int) -> AsyncGenerator[Step, None]:
    predicted = request.predicted_length
    asked = replace(
        request,
        max_tokens=limit,
        predicted_length=limit if predicted is None else min(limit, predicted),
        policy=Policy.LOSSLESS,
        rollback_threshold=None,
    )
    # An edge that is to continue needs no verification of what it writes, and so no other stream.
    alone = streams.config.on_outage is OnOutage.CONTINUE
    return streams.cloud_alone(asked) if alone else streams.cloud(asked)


def _in_edge_tokens(edge: EdgeModel, opened: Opened, guidance: Sequence[Token]) -> list[int]:
    vocabulary = edge.model.vocabulary
    if opened.vocabulary_sha256 == vocabulary.sha256:
        return [token.id for token in guidance]
    text = b"".join(token.piece for token in guidance)
    return tokens_of(text, ByteTokenizer(vocabulary), lambda run: edge.model.tokenize(run, special=False))
