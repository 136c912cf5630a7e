"""Lookahead decoding as a drafter: the model's own greedy text, in fewer passes over its weights.

Fu et al. 2024, arXiv:2402.02057. Each pass evaluates a tree of tokens behind the text. Its branches are the
window, whose tokens are guesses from earlier passes (Jacobi iterations) and give new n-grams, and n-grams
collected before that begin with the text's last token; of those, what the model would have said itself is
taken. A token of the tree stands in the sequence of every branch through it, so that window and
verification share one `llama_decode`, as in the paper.

For `benchmarks.spec_bench` only, no drafter of `duet`: it proposes what the model proposes without it, and
is faster only where a pass over a few dozen tokens costs hardly more than a pass over one.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.config import CacheType
from shared.llama import LlamaContext, LlamaModel
from shared.llama.model import engine_error, forget_engine_errors

try:
    import llama_cpp
except ImportError:  # LlamaModel says so, and no context exists without a model
    llama_cpp = None

_LONGEST_STEM = 16
"""More new text than this is read before the tree is."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The paper's W, N and G."""

    window: int
    """Columns of the window, >= 1: positions that are guessed at once."""
    ngram: int
    """Tokens of an n-gram, >= 2. The window has one row less."""
    guesses: int
    """N-grams verified in a pass, at most."""

    @property
    def num_branches(self) -> int:
        return self.window + self.guesses

    def __str__(self) -> str:
        return f"W={self.window}, N={self.ngram}, G={self.guesses}"


class NgramPool:
    """The latest n-grams by their first token.

    >>> pool = NgramPool(size=2)
    >>> for ngram in ((1, 2, 3), (1, 4, 5), (1, 2, 3), (1, 6, 7)):
    ...     pool.add(ngram)
    >>> pool.after(1)
    [(6, 7), (2, 3)]
    """

    def __init__(self, size: int) -> None:
        """
        Args:
            size: n-grams kept for each first token; the oldest go.
        """
        self._size = size
        self._by_first: dict[int, list[tuple[int, ...]]] = {}

    def add(self, ngram: Sequence[int]) -> None:
        first, *rest = ngram
        known = self._by_first.setdefault(first, [])
        if tuple(rest) in known:
            known.remove(tuple(rest))
        known.insert(0, tuple(rest))
        del known[self._size :]

    def after(self, token: int) -> list[tuple[int, ...]]:
        """What followed the token, latest first, without the token itself."""
        return list(self._by_first.get(token, ()))


class Window:
    """Guesses of the tokens ahead, from the N - 1 last Jacobi iterations, oldest first.

    Column i of row j stands i + j positions behind the text's last token.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        """
        Args:
            rows: [N - 1, W]; any tokens will do in the beginning.
        """
        self._rows = [list(row) for row in rows]

    def paths(self) -> list[list[int]]:
        """For each column i the tokens behind the text that its next guess is made from, [W] of i + N - 2.

        The first row's tokens up to the column, then the column's other rows: the text's last token stands
        for the first row's column 0.

        >>> Window([[10, 11, 12], [20, 21, 22]]).paths()
        [[20], [11, 21], [11, 12, 22]]
        """
        first, *others = self._rows
        return [[*first[1 : i + 1], *(row[i] for row in others)] for i in range(len(first))]

    def slide(self, last: int, guesses: Sequence[int]) -> list[tuple[int, ...]]:
        """Take the newest iteration in, let the oldest go; returns the n-gram that each column completes.

        Args:
            last: the text's last token when the guesses were made.
            guesses: [W]

        >>> window = Window([[10, 11, 12], [20, 21, 22]])
        >>> window.slide(1, [30, 31, 32])
        [(1, 20, 30), (11, 21, 31), (12, 22, 32)]
        >>> window.paths()
        [[30], [21, 31], [21, 22, 32]]
        """
        self._rows[0][0] = last
        rows = [*self._rows, list(guesses)]
        self._rows = rows[1:]
        return list(zip(*rows, strict=True))


class TokenTree:
    """Ways in which a text may go on, common beginnings held once. Nodes are numbered, parents first."""

    def __init__(self, stem: Sequence[int]) -> None:
        """
        Args:
            stem: at least one token that every way begins with; the last of them is the root.
        """
        self.token_ids = list(stem)
        self.parents = list(range(-1, len(stem) - 1))
        self.root = len(stem) - 1
        self.read = {self.root}
        """Nodes of which the model's next token is asked for."""
        self._children: dict[tuple[int, int], int] = {}

    def add(self, path: Sequence[int]) -> list[int]:
        """Add what may follow the root; returns its nodes.

        >>> tree = TokenTree([7])
        >>> tree.add([1, 2]), tree.add([1, 3]), tree.leaves()
        ([1, 2], [1, 3], [2, 3])
        """
        node, nodes = self.root, []
        for token in path:
            if (child := self._children.get((node, token))) is None:
                child = self._children[node, token] = len(self.token_ids)
                self.token_ids.append(token)
                self.parents.append(node)
            node = child
            nodes.append(node)
        return nodes

    def leaves(self) -> list[int]:
        return sorted(set(range(len(self.parents))) - set(self.parents))

    def way_to(self, node: int) -> list[int]:
        """The nodes from the stem's first token to `node`."""
        way = []
        while node >= 0:
            way.append(node)
            node = self.parents[node]
        return way[::-1]

    def greedy(self, next_token: dict[int, int]) -> tuple[list[int], int]:
        """Follow the model from the root as long as what it says is in the tree and was asked about.

        Args:
            next_token: for each node that was read, what the model says after it.
        Returns:
            What the model says, at least one token, and the node before the last of them.

        >>> tree = TokenTree([7])
        >>> tree.read.update(tree.add([1, 2, 3]))
        >>> tree.greedy({0: 1, 1: 2, 2: 9, 3: 4})
        ([1, 2, 9], 2)
        """
        node, said = self.root, [next_token[self.root]]
        while (child := self._children.get((node, said[-1]))) in next_token:
            assert child is not None
            node = child
            said.append(next_token[node])
        return said, node


class TreeContext(LlamaContext):
    """A context whose first sequence is a text; the others are the branches of one tree behind it."""

    def __init__(
        self,
        model: LlamaModel,
        shape: Shape,
        *,
        context_tokens: int,
        threads: int | None = None,
        cache_type: CacheType = "f16",
    ) -> None:
        tree_tokens = _LONGEST_STEM + shape.window + shape.num_branches * (shape.ngram - 1)
        super().__init__(
            model,
            num_sequences=1 + shape.num_branches,
            context_tokens=context_tokens,
            cache_tokens=context_tokens + tree_tokens,
            rollback_tokens=0,
            max_rows=tree_tokens,
            threads=threads,
            cache_type=cache_type,
        )
        self._tree_batch = llama_cpp.llama_batch_init(self.max_batch_tokens, 0, 1 + shape.num_branches)

    def close(self) -> None:
        if hasattr(self, "_tree_batch"):
            llama_cpp.llama_batch_free(self._tree_batch)
            del self._tree_batch
        super().close()

    def follow(self, tree: TokenTree, asked: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Evaluate a tree behind the text in one pass; the text goes on by what the model says itself.

        Args:
            tree: its stem follows what is cached of the text.
            asked: nodes beside `tree.read` of which the model's next token is wanted.
        Returns:
            What the model says after the root, the last token of it not yet cached; and what it says after
            each of `asked`.
        """
        leaves = tree.leaves()
        branches: list[list[int]] = [[] for _ in tree.token_ids]
        kept = len(self.cached[0])
        for sequence, leaf in enumerate(leaves, 1):
            llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, 0, kept)
            for node in tree.way_to(leaf):
                branches[node].append(sequence)
        rows = {*tree.read, *asked}
        batch: Any = self._tree_batch
        depths: list[int] = []
        for node, token in enumerate(tree.token_ids):
            depths.append(depths[tree.parents[node]] + 1 if node else 0)
            batch.token[node] = token
            batch.pos[node] = kept + depths[node]
            batch.n_seq_id[node] = len(branches[node])
            for i, sequence in enumerate(branches[node]):
                batch.seq_id[node][i] = sequence
            batch.logits[node] = node in rows
        batch.n_tokens = len(tree.token_ids)
        forget_engine_errors()
        if status := llama_cpp.llama_decode(self._handle, batch):
            raise RuntimeError(f"llama.cpp could not decode a tree (status {status}): {engine_error()}")
        self.num_decoded_tokens += len(tree.token_ids)
        next_token = {node: int(np.argmax(self._row(node))) for node in rows}
        said, last = tree.greedy({node: next_token[node] for node in tree.read})
        taken = tree.way_to(last)
        llama_cpp.llama_memory_seq_cp(self._memory, branches[last][0], 0, kept, kept + len(taken))
        for sequence in range(1, len(leaves) + 1):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        self.cached[0] += [tree.token_ids[node] for node in taken]
        return said, [next_token[node] for node in asked]


class LookaheadDrafter:
    """Drafts of one stream. What a pass finds beyond a draft is kept for the next."""

    def __init__(self, context: TreeContext, shape: Shape) -> None:
        self._context = context
        self._shape = shape
        self._pool = NgramPool(shape.guesses)
        self._window: Window | None = None
        self._text: list[int] = []
        """With `_ahead` behind it, what is known of the model's greedy text."""
        self._ahead: list[int] = []
        self.num_passes = 0

    def propose(self, text_ids: Sequence[int], num_tokens: int, end_token_ids: Collection[int]) -> list[int]:
        """The model's own greedy continuation: `num_tokens`, fewer after an end of text."""
        text = list(text_ids)
        known = [*self._text, *self._ahead]
        self._ahead = known[len(text) :] if known[: len(text)] == text else []
        self._text = text
        while len(self._ahead) < num_tokens and not set(end_token_ids).intersection(self._ahead):
            self._ahead += self.advance([*text, *self._ahead])
        drafted = self._ahead[:num_tokens]
        ends = [i for i, token in enumerate(drafted) if token in end_token_ids]
        return drafted[: ends[0] + 1] if ends else drafted

    def advance(self, text: list[int]) -> list[int]:
        """The model's greedy continuation of any text by as many tokens as one pass gives, at least one."""
        context = self._context
        kept = context.align(0, text[:-1])
        if len(text) - kept > _LONGEST_STEM:
            context.extend(0, text[kept:-1], 0)
            kept = len(text) - 1
        if self._window is None:  # in the paper, too, any tokens to begin with
            guess = random.Random(len(text)).choices
            self._window = Window([guess(text, k=self._shape.window) for _ in range(self._shape.ngram - 1)])
        tree = TokenTree(text[kept:])
        for ngram in self._pool.after(text[-1]):
            tree.read.update(tree.add(ngram))
        columns = [tree.add(path)[-1] if path else tree.root for path in self._window.paths()]
        said, guesses = context.follow(tree, columns)
        for found in self._window.slide(text[-1], guesses):
            self._pool.add(found)
        self.num_passes += 1
        return said
