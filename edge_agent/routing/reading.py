"""Evaluates probes: the question is read once, and all one-token probes in one more batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_agent.edge_model import PROBE_SEQUENCES, EdgeModel
from edge_agent.routing.probes import Float, OptionProbe, Probe, Question, Reading, Said
from shared.llama import Extension, LlamaContext
from shared.messages import Message

PROBE_TOKENS = 64
"""Room in the context that a question longer than it leaves for probes."""

Priors = dict[str, Float]


class QuestionReader:
    """Reads questions and asks the model about them. Use it in the model's thread (`EdgeModel.run`).

    A question is read in the sequence that its answer is drafted in, which finds it there.
    """

    def __init__(self, edge: EdgeModel, priors: Priors) -> None:
        """
        Args:
            priors: known ones by `prior_key`; what is missing is measured once and added.
        """
        self._model = edge.model
        self._context: LlamaContext = edge.context
        self._sequence = edge.sequence
        self._priors = priors

    def question(self, messages: Sequence[Message]) -> Question:
        """Render a chat; one that does not fit keeps its head and its tail."""
        token_ids = self._model.render_chat(messages)
        room = self._context.context_tokens - PROBE_TOKENS
        if len(token_ids) <= self._context.context_tokens:
            return Question(tuple(messages), tuple(token_ids))
        half = room // 2
        return Question(tuple(messages), (*token_ids[:half], *token_ids[half - room :]), is_cut=True)

    def read(
        self, question: Question, probes: Sequence[Probe], *, answer_follows: bool = True
    ) -> list[Reading]:
        """One reading for each probe that applies.

        Args:
            answer_follows: leave the question in the cache, for its answer; without, the last prompt stays
                there, so that examples which many questions share are evaluated once.
        """
        probes = [probe for probe in probes if probe.applies(question)]
        priors = {probe.name: self._prior(probe, question) for probe in probes}
        said = self._ask(question, probes)
        if answer_follows:
            self._restore(list(question.token_ids))
        return [
            probe.read(self._model, question, heard, priors[probe.name])
            for probe, heard in zip(probes, said, strict=True)
        ]

    def prompt(self, question: Question, probe: Probe) -> list[int]:
        """A probe's own prompt; one that leaves no room for its words keeps its head and its tail."""
        prompt = probe.prompt(self._model, question)
        room = self._context.context_tokens
        if len(prompt) + probe.max_words <= room:
            return prompt
        return [*prompt[: room // 4], *prompt[-room // 2 :]]

    def _prior(self, probe: Probe, question: Question) -> Float | None:
        if not isinstance(probe, OptionProbe) or not probe.takes_prior:
            return None
        key = prior_key(probe, question)
        if key not in self._priors:
            empty = self.question([Message("user", probe.without_content(question))])
            [said] = self._ask(empty, [probe])
            self._priors[key] = probe.option_logprobs(self._model, empty, said)
        return self._priors[key]

    def _ask(self, question: Question, probes: Sequence[Probe]) -> list[Said]:
        """What the model says to each; those that share the question first, in as few batches as possible."""
        prompts = [self.prompt(question, probe) for probe in probes]
        ids = list(question.token_ids)
        shares = [
            i for i, probe in enumerate(probes) if probe.max_words == 0 and prompts[i][: len(ids)] == ids
        ]
        said: dict[int, Said] = dict(self._ask_sharing(ids, {i: prompts[i][len(ids) :] for i in shares}))
        for i, probe in enumerate(probes):
            if i not in said:
                said[i] = self._ask_alone(prompts[i], probe.max_words)
        return [said[i] for i in range(len(probes))]

    def _ask_sharing(self, ids: list[int], suffixes: dict[int, list[int]]) -> dict[int, Said]:
        if not suffixes:
            return {}
        context = self._context
        kept = context.align(self._sequence, ids[:-1])
        at_end = _said(context.extend(self._sequence, ids[kept:], 1)[0])
        said = {i: at_end for i, suffix in suffixes.items() if not suffix}
        rest = [i for i in suffixes if suffixes[i]]
        for group in (rest[k : k + PROBE_SEQUENCES] for k in range(0, len(rest), PROBE_SEQUENCES)):
            for sequence, _ in enumerate(group, start=1):
                context.copy_prefix(self._sequence, sequence, len(ids))
            rows = context.decode(
                [Extension(sequence, suffixes[i], 1) for sequence, i in enumerate(group, start=1)]
            )
            said |= {i: _said(row[0]) for i, row in zip(group, rows, strict=True)}
            for sequence, _ in enumerate(group, start=1):
                context.rewind(sequence, 0)
        return said

    def _ask_alone(self, prompt: list[int], max_words: int) -> Said:
        """Evaluate one prompt, and let the model write where it may; greedy."""
        context, ends = self._context, self._model.end_token_ids
        kept = context.align(self._sequence, prompt[:-1])
        first = _said(context.extend(self._sequence, prompt[kept:], 1)[0])
        logprobs = first.logprobs
        written: list[int] = []
        heard: list[float] = []
        while len(written) < max_words:
            token = int(np.argmax(logprobs))
            heard.append(float(logprobs[token]))
            written.append(token)
            if token in ends or len(written) == max_words:
                break
            logprobs = _said(context.extend(self._sequence, [token], 1)[0]).logprobs
        text = b"".join(self._model.piece(token) for token in written).decode("utf-8", "replace")
        return Said(first.logprobs, text, tuple(heard))

    def _restore(self, ids: list[int]) -> None:
        if self._context.cached[self._sequence] != ids:
            kept = self._context.align(self._sequence, ids[:-1])
            self._context.extend(self._sequence, ids[kept:], 1)


def prior_key(probe: OptionProbe, question: Question) -> str:
    """Letters have one prior for each number of options."""
    options = probe.options(question)
    return f"{probe.name}/{len(options)}"


def _said(row: np.ndarray) -> Said:
    logits = row.astype(np.float64)
    peak = logits.max()
    return Said(logits - peak - np.log(np.exp(logits - peak).sum()))
