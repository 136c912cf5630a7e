"""Rows as `duet eval speculation` makes them, settings and questions side by side: for slow machines.

Greedy stop-and-wait with the real session and policies, so nothing depends on time. Where settings have come
to the same text, its draft and the target's rows are computed once; streams share passes over the weights, as
they do in the service. What `lossless` writes stands for the target's own stream.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import machine
from edge_agent.evaluation.grading import is_right
from edge_agent.evaluation.items import Item, load_items
from edge_agent.evaluation.speculation import Setting, agreement, grid
from shared.config import DEFAULT_DRAFT, DEFAULT_TARGET
from shared.json_lines import numbered_lines
from shared.llama import LlamaContext, LlamaModel
from shared.llama.context import Extension, common_prefix
from shared.messages import Draft, Message, Policy
from shared.models import Registry, resolve
from shared.session import CloudSession

FEW_TOKENS = 8
"""That go into a pass beside other streams' instead of one of their own."""


@dataclass(slots=True)
class Stream:
    """One question under one setting."""

    item: Item
    setting: Setting
    prompt: list[int]
    sequence: int
    session: CloudSession
    max_tokens: int
    num_drafted: int = 0
    num_accepted: int = 0
    num_rejections: int = 0

    @property
    def text(self) -> tuple[int, ...]:
        return (*self.prompt, *self.session.committed)

    @property
    def room(self) -> int:
        """Tokens that may be drafted: the last position is the target's own."""
        return self.max_tokens - 1 - len(self.session.committed)


@dataclass(slots=True)
class Seen:
    """What both models say after a text."""

    draft: list[int] = field(default_factory=list)
    target_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Pair:
    """Both models, each with a KV cache for every stream."""

    def __init__(self, num_streams: int, arguments: argparse.Namespace) -> None:
        self._draft_tokens = arguments.draft_tokens
        self._edge = _context(DEFAULT_DRAFT, num_streams, num_streams, arguments)
        self._target = _context(
            DEFAULT_TARGET, num_streams, num_streams * (self._draft_tokens + 1), arguments
        )
        self.model = self._target.model

    def look(self, streams: Sequence[Stream]) -> list[Seen]:
        """Draft after each stream's text, and score the drafts."""
        seen = [Seen() for _ in streams]
        self._draft(streams, seen)
        self._score(streams, seen)
        return seen

    def _draft(self, streams: Sequence[Stream], seen: Sequence[Seen]) -> None:
        pending = {
            i: _missing(self._edge, stream.sequence, stream.text)
            for i, stream in enumerate(streams)
            if stream.room
        }
        while pending:
            work = [Extension(streams[i].sequence, tokens, 1) for i, tokens in pending.items()]
            for i, [row] in zip(list(pending), self._edge.decode(work), strict=True):
                token = int(np.argmax(row))
                seen[i].draft.append(token)
                pending[i] = [token]
                most = min(self._draft_tokens, streams[i].room)
                if len(seen[i].draft) == most or token in self.model.end_token_ids:
                    del pending[i]

    def _score(self, streams: Sequence[Stream], seen: Sequence[Seen]) -> None:
        work = []
        for stream, each in zip(streams, seen, strict=True):
            tokens = [*_missing(self._target, stream.sequence, stream.text), *each.draft]
            work.append(Extension(stream.sequence, tokens, len(each.draft) + 1))
        for each, rows in zip(seen, self._target.decode(work), strict=True):
            each.target_ids = [int(np.argmax(row)) for row in rows]
            each.logprobs = [_logprob(row, token) for row, token in zip(rows, each.draft, strict=False)]


def _context(name: str, num_streams: int, num_rows: int, arguments: argparse.Namespace) -> LlamaContext:
    return LlamaContext(
        LlamaModel(resolve(name, Registry.load()).path, name, gpu_layers=arguments.gpu_layers),
        num_sequences=num_streams,
        context_tokens=arguments.context_tokens,
        rollback_tokens=64,
        max_batch_tokens=max(512, num_rows + num_streams * FEW_TOKENS),
        max_rows=num_rows,
        threads=arguments.threads,
    )


def _missing(context: LlamaContext, sequence: int, text: Sequence[int]) -> list[int]:
    """A text's last few tokens, the cache holding those before; another sequence may have had them."""
    wanted = list(text)
    shared = [common_prefix(cached, wanted) for cached in context.cached]
    source = int(np.argmax(shared))
    if shared[source] > shared[sequence]:
        context.copy_prefix(source, sequence, shared[source])
    kept = context.align(sequence, wanted[:-1])
    if kept < len(wanted) - FEW_TOKENS:
        context.extend(sequence, wanted[kept:-1], 0)
        kept = len(wanted) - 1
    return wanted[kept:]


def _logprob(row: NDArray[np.float32], token: int) -> float:
    top = float(row.max())
    return min(0.0, float(row[token]) - top - float(np.log(np.exp(row - top).sum(dtype=np.float64))))


def answer(pair: Pair, items: Sequence[Item], settings: Sequence[Setting], max_tokens: int) -> list[Stream]:
    """All settings of a few questions."""
    model = pair.model
    streams = []
    for item in items:
        prompt = model.render_chat([Message("user", item.question)])
        for setting in settings:
            session = CloudSession(
                committed=(),
                max_tokens=max_tokens,
                max_draft_tokens=setting.max_draft_tokens,
                end_token_ids=model.end_token_ids,
                legal_token_ids=range(len(model.token_kinds)),
                policy=setting.policy,
                rollback_threshold=setting.rollback_threshold,
            )
            streams.append(Stream(item, setting, prompt, len(streams), session, max_tokens))
    seen: dict[tuple[int, ...], Seen] = {}
    while running := [stream for stream in streams if not stream.session.done]:
        new = {stream.text: stream for stream in running if stream.text not in seen}
        seen.update(zip(new, pair.look(list(new.values())), strict=True))
        for stream in running:
            _judge(stream, seen[stream.text])
    return streams


def _judge(stream: Stream, seen: Seen) -> None:
    session = stream.session
    session.receive(Draft(session.epoch, len(session.committed), tuple(seen.draft), more=False))
    round_ = session.next_round()
    assert round_ is not None
    num_scored = len(round_.token_ids)
    verdict = session.judge(
        round_, seen.target_ids[: round_.num_positions], logprobs=np.array(seen.logprobs[:num_scored])
    )
    stream.num_drafted += len(seen.draft)
    stream.num_accepted += verdict.num_accepted
    stream.num_rejections += verdict.num_accepted < num_scored


def row(stream: Stream, lossless: Sequence[int], model: LlamaModel) -> dict[str, object]:
    tokens, setting = stream.session.committed, stream.setting
    words = [token for token in tokens if token not in model.end_token_ids]
    text = b"".join(map(model.piece, words)).decode("utf-8", "replace")
    return {
        "id": f"{stream.item.id}|{setting.name}",
        "item": stream.item.id,
        "category": stream.item.group,
        "setting": setting.name,
        "policy": setting.policy.value,
        "max_draft_tokens": setting.max_draft_tokens,
        "committed": len(tokens),
        "drafted": stream.num_drafted,
        "accepted": stream.num_accepted,
        "rejections": stream.num_rejections,
        "target_passes": stream.session.num_rounds,
        "correct": is_right(stream.item, text),
        "agreement": agreement(tokens, lossless),
    }


def groups(items: Sequence[Item], size: int, done: frozenset[str]) -> Iterator[list[Item]]:
    left = [item for item in items if item.id not in done]
    for i in range(0, len(left), size):
        yield left[i : i + size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--draft-tokens", type=int, default=16)
    parser.add_argument("--rollback", type=float, action="append", required=True)
    parser.add_argument("--side-by-side", type=int, default=3, help="questions")
    parser.add_argument("--context-tokens", type=int, default=768, help="of a stream")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu-layers", type=int, default=0, help="of both models; -1 is all")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    settings = grid((Policy.LOSSLESS, Policy.BILD), (arguments.draft_tokens,), (0.0,), arguments.rollback)
    rows_file = arguments.out / "rows.jsonl"
    done: frozenset[str] = frozenset()
    if rows_file.exists():
        done = frozenset(json.loads(line)["item"] for _, line in numbered_lines(rows_file.read_text()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    identity = {
        "edge": {"model": DEFAULT_DRAFT},
        "cloud": DEFAULT_TARGET,
        "settings": [each.name for each in settings],
        "max_answer_tokens": arguments.max_tokens,
    }
    (arguments.out / "manifest.json").write_text(
        json.dumps({"identity": identity, "machine": machine()}, indent=1)
    )
    pair = Pair(arguments.side_by_side * len(settings), arguments)
    for items in groups(load_items(arguments.data, limit=arguments.limit), arguments.side_by_side, done):
        streams = answer(pair, items, settings, arguments.max_tokens)
        with rows_file.open("a", encoding="utf-8") as out:
            for i in range(0, len(streams), len(settings)):
                own = streams[i].session.committed
                for stream in streams[i : i + len(settings)]:
                    made = row(stream, own, pair.model)
                    out.write(json.dumps(made) + "\n")
                    print(made["id"], made["committed"], made["target_passes"], made["correct"], flush=True)


if __name__ == "__main__":
    main()
