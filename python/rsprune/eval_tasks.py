"""Tasks of lm-evaluation-harness on a streamed model. The harness is an extra: `rsprune[eval]`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rsprune.errors import UsageError
from rsprune.eval_journal import fingerprint, open_journal
from rsprune.evaluate import BATCH_TOKENS
from rsprune.memory import PeakWatch
from rsprune.progress import NullProgress, Progress
from rsprune.scoring import Scorer
from rsprune.skeleton import load_tokenizer
from rsprune.sources import resolve


@dataclass(frozen=True)
class TaskResults:
    """What the harness measured.

    Attributes:
        results: metrics by task, then by the harness's names for them (`acc,none`).
        versions: of the tasks.
        examples: that each task was measured on.
        samples: every example with its log-likelihoods, by task, as the harness keeps them.
        table: the results as text.
        seconds: of this run, which may have gone on with an earlier one.
        peak_rss_anon: the most anonymous memory that was seen in use, in bytes.
    """

    results: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    examples: dict[str, int]
    samples: dict[str, list[dict[str, Any]]]
    table: str
    seconds: float
    peak_rss_anon: int


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seq_len: int | None = None,
    memory: int | str | None = None,
    resume: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> TaskResults:
    """Measures a checkpoint on tasks of lm-evaluation-harness that ask for log-likelihoods.

    Args:
        model: folder, hub id or GGUF file.
        tasks: names of tasks, groups or tags, or YAML files.
        include_path: a folder of further task files; tasks with local data need no network.
        num_fewshot: examples in front of a question; None is what the task says.
        limit: only the first examples of every task; None takes all.
        seq_len: most tokens that the model is given at a time; None is what its config says.
        memory, device, threads, trust_remote_code, progress: as in `perplexity`.
        resume: a file that keeps finished requests; they are not computed again.

    Raises:
        UsageError: the harness is not installed, a task is not known or generates text, or as in
            `perplexity`.
        DoesNotFitError: memory does not suffice for the longest request.
        RspruneError: a log-likelihood is not finite.
    """
    if find_spec("lm_eval") is None:
        raise UsageError("tasks: need lm-evaluation-harness: pip install 'rsprune[eval]'")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import resolve_max_length
    from lm_eval.utils import make_table

    from rsprune.harness import StreamedLM

    started = time.perf_counter()
    progress = progress or NullProgress()
    loaded = _load(tasks, include_path, num_fewshot)
    folder = resolve(str(model), progress=progress.note)
    with PeakWatch() as watch:
        scorer = Scorer.open(
            folder,
            memory=memory,
            device=device,
            threads=threads,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        if warning := scorer.skeleton.beyond_context(seq_len or 0):
            progress.note(f"warning: {warning}")
        tokenizer = load_tokenizer(folder, trust_remote_code)
        current = {} if resume is None else fingerprint(scorer.skeleton, measure="tasks")
        with open_journal(resume, current) as journal:
            lm = StreamedLM(
                scorer,
                tokenizer,
                max_length=seq_len or resolve_max_length(scorer.skeleton.config, tokenizer),
                journal=journal,
                most_tokens=None if resume is None else BATCH_TOKENS,
            )
            with contextlib.redirect_stdout(sys.stderr):  # the harness prints now and then
                found = evaluate(lm=lm, task_dict=loaded, limit=limit)
    return TaskResults(
        results=found["results"],
        versions=found["versions"],
        examples={name: counts["effective"] for name, counts in found["n-samples"].items()},
        samples=found["samples"],
        table=make_table(found),
        seconds=time.perf_counter() - started,
        peak_rss_anon=watch.peak,
    )


def _load(tasks: Sequence[str], include_path: Path | None, num_fewshot: int | None) -> Any:
    """The tasks as the harness keeps them, seeded as on its own command line."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    from rsprune.harness import NO_GENERATION

    loaded = _found(list(tasks), include_path)
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            raise UsageError(f"task {name}: {NO_GENERATION}")
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # a task's own 0 is meant so
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _found(tasks: list[str], include_path: Path | None) -> Any:
    """Looks into `include_path` first: to list the harness's own thousands of tasks takes long."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not include_path.is_dir():
            raise UsageError(f"include-path {include_path}: expected a folder of task files")
        with contextlib.suppress(KeyError):
            return TaskManager(include_path=str(include_path), include_defaults=False).load(tasks)
    try:
        return TaskManager(include_path=include_path and str(include_path)).load(tasks)
    except (KeyError, ValueError) as error:
        raise UsageError(f"tasks {', '.join(tasks)}: {error.args[0]}") from None
