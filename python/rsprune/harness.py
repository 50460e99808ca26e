"""A streamed model as lm-evaluation-harness sees one; importing this module needs the harness.

All requests of a call go through the model together, so the checkpoint is read once for as many as
the memory bound lets. Requests with the same inputs, such as those for the answers A, B, C and D,
are one passage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rsprune.errors import UsageError
from rsprune.eval_journal import Journal
from rsprune.head import Passage
from rsprune.scoring import Scorer

NO_GENERATION = (
    "expected a task of log-likelihoods (multiple choice, perplexity), found one that generates "
    "text, for which every token would take a pass over the checkpoint"
)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as text (None for a part of a rolling request), and their tokens."""

Question = tuple[tuple[int, ...], tuple[int, ...]]
"""Inputs, and the tokens that are to follow the last of them."""


class StreamedLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Answers log-likelihood requests; text becomes tokens as in the harness's own `hf` model.

    Args:
        scorer: runs the model.
        tokenizer: the model's.
        max_length: most tokens that the model is given; contexts are cut at the left.
        journal: keeps answers; those that it holds are not computed again.
        most_tokens: of a batch, whatever the memory; None for no such bound.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Any,
        *,
        max_length: int,
        journal: Journal,
        most_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._scorer = scorer
        self._journal = journal
        self._most_tokens = most_tokens

    @property
    def eot_token_id(self) -> int:
        """The token at the end of a text."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from."""
        bos: int | None = self.tokenizer.bos_token_id
        if bos is None and self.tokenizer.eos_token_id is None:
            raise UsageError("tokenizer: expected a BOS or EOS token to start a text, found none")
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text; special tokens as the tokenizer adds them, but no second BOS."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        starts = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and string.startswith(starts):
            options = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer.encode(string, verbose=False, **options)
        return ids

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """For every request the log-likelihood of its continuation, and whether it is greedy's."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """For every request the log-likelihood of its whole text, in windows of `max_length`."""
        parts: list[Request] = []
        counts = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(parts)
            parts.extend((None, *make_disjoint_window(window)) for window in windows)
            counts.append(len(parts) - before)
        answers = iter(self._loglikelihood_tokens(parts))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> NoReturn:
        """Refuses: a generated token would need a pass over the checkpoint of its own."""
        raise UsageError(f"task {requests[0].task_name}: {NO_GENERATION}")

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """The answers, in the order of the requests."""
        asked = [self._question(request) for request in requests]
        cut = sum(len(one) + len(two) > self.max_length + 1 for _, one, two in requests)
        if cut:
            limit = f"longer than {self.max_length} tokens"
            self._scorer.progress.note(
                f"{cut} requests are {limit}: their contexts are cut at the left"
            )
        passages, names = self._passages(asked)
        for passage, scores in self._scorer.score(passages, most_tokens=self._most_tokens):
            for name, score in zip(names[passage.name], scores, strict=True):
                self._journal.write(name, [score.log_likelihood, score.greedy])
        found = (self._journal.finished[_name(question)] for question in asked)
        return [(log_likelihood, greedy) for log_likelihood, greedy in found]

    def _question(self, request: Request) -> Question:
        """The inputs of a request, cut at the left, and what is to follow the last of them."""
        _, context, continuation = request
        if not 0 < len(continuation) <= self.max_length:
            raise UsageError(
                f"continuation {request[0]}: expected 1 to {self.max_length} tokens, "
                f"found {len(continuation)}"
            )
        return tuple([*context, *continuation][:-1][-self.max_length :]), tuple(continuation)

    def _passages(self, asked: Iterable[Question]) -> tuple[list[Passage], dict[str, list[str]]]:
        """What is still to be run, and the journal's name for each target of every passage."""
        targets: dict[tuple[int, ...], dict[tuple[int, ...], str]] = {}
        for question in asked:
            name = _name(question)
            if name not in self._journal.finished:
                inputs, target = question
                targets.setdefault(inputs, {})[target] = name
        passages, names = [], {}
        for number, (inputs, ends) in enumerate(targets.items()):
            passage = Passage(
                f"request {number}", torch.tensor(inputs), tuple(torch.tensor(end) for end in ends)
            )
            passages.append(passage)
            names[passage.name] = list(ends.values())
        return passages, names


def _name(question: Question) -> str:
    """A request in the journal: by its tokens, whatever task it belongs to."""
    inputs, target = question
    digest = hashlib.sha256(f"{inputs} {target}".encode()).hexdigest()
    return f"request {digest[:32]}"
