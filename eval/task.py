"""What is asked of a model, as a small TOML file over the user's JSON Lines: fields, prompt, sampling, vote, scoring.

    name = "medqa"                       kind: choice          pick an option by writing; k samples, a vote
    kind = "choice"                            choice_logprob  pick the option whose text (or letter) is likeliest
    [fields]                                   numeric         write a number
    question = "question"                      code            write a program that passes tests; pass@k
    [prompt]                                   free            write anything; a model judges it
    text = "{question}\\n\\n{options}"           preference      prefer chosen to rejected (rows are pairs)
    [sampling]                                 perplexity      nats a token of a text
    n = 5

`{name}` in a prompt is `question`, `options`, `labels` or any column of the row; `{{name}}` is `{name}` itself. Which
tables and keys there are is what the classes below say; docs/evaluation.md has examples. No model is run here.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from data_tools.placeholders import names_in
from data_tools.samples import digest_of
from eval.sampling import SamplingOptions
from eval.vote import Ties
from trainer.config_values import nearest, typed
from trainer.errors import ABSENT, ConfigError, UserError

Kind = Literal["choice", "choice_logprob", "numeric", "code", "free", "preference", "perplexity"]
GENERATED = ("choice", "numeric", "code", "free")
"""Kinds that are answered by drawing samples."""
WITH_OPTIONS = ("choice", "choice_logprob")
WITH_VOTE = ("choice", "numeric")
OWN_TASKS = Path(__file__).resolve().parent / "tasks"


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Columns of the data. `subject` may be missing in a row; `id` too, then it is `<file name>:<line>`."""

    id: str = "id"
    question: str = "question"
    options: str = "options"
    """An object, label to text, or a list of texts (labels A, B, ...)."""
    answer: str = "answer"
    """The right option's label, or the right number."""
    subject: str = "subject"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The texts that are made of a row."""

    text: str = "{question}"
    system: str | None = None
    option: str = "{label}. {text}"
    """A line of `{options}`."""
    completion: str = ""
    """What is scored: of each option (`{text}` or `{label}`), or of a row of perplexity."""
    api: Literal["chat", "completions"] = "chat"
    """chat: a message of the user; completions: plain text that goes on."""
    few_shot: str | None = None
    """JSON Lines of rows like the data's: examples before every prompt, in their order, each in this very form. A path
    beside the task file, or an absolute one."""
    shots: int | None = None
    """How many of them; none: all that are not the item itself."""
    shot: str = "{gold}"
    """What an example answers, for kinds that draw: `{gold}`, `{gold_text}` (the right option's) or any column. Where
    texts are scored it is `completion`, of the right option."""


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What makes one answer of the samples; see eval.vote."""

    threshold: int = 1
    ties: Ties = "abstain"


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """What the model of --verifier is asked where the vote abstains; see eval.verifier."""

    text: str = (
        "{question}\n\nHere are {n} answers to this question.\n\n{answers}\n\n"
        'Which answer contains the least incorrect information? End with "The answer is K", where K is its number.'
    )
    """`{answers}`: all samples, numbered; `{n}`: how many."""
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What the model of --judge is asked of a free answer; see eval.judge."""

    text: str = (
        "Question:\n{question}\n\nReference answer:\n{gold}\n\nAnswer to be judged:\n{response}\n\n"
        "Does the answer to be judged say the same as the reference answer? Reply with Yes or No only."
    )
    """`{gold}`: the reference; `{response}`: the answer; of rows with options also `{options}` and `{gold_text}`."""
    right: str = "Yes"
    wrong: str = "No"
    max_tokens: int = 16
    """For a judge that writes its verdict (--judge-samples)."""
    audit: int = 50
    """So many judged samples are written to audit.jsonl for a person."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How answers are judged and counted."""

    rule: Literal["sum", "per_token", "per_byte", "reward"] = "sum"
    """choice_logprob: what of an option's log-prob is compared. preference: sum and per_token compare the model's own
    log-probs, reward compares their gain over the model of --reference."""
    k: tuple[int, ...] = ()
    """pass@k is reported for these, each at most sampling.n."""
    penalty: float | None = None
    """What a wrong answer costs in negative marking; none: 1 / (options - 1) for choices, else not reported."""
    rel_tol: float = 1e-6
    """numeric: relative tolerance; 0: exact."""
    timeout_s: float = 10.0
    """code: for all tests of a program."""
    memory_mib: int = 1024
    workers: int = 2


@dataclass(frozen=True, kw_only=True)
class Task:
    """A checked task file."""

    name: str
    kind: Kind
    fields: Fields = field(default_factory=Fields)
    prompt: Prompt = field(default_factory=Prompt)
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(temperature=0.0))
    vote: Vote = field(default_factory=Vote)
    verifier: Verifier = field(default_factory=Verifier)
    judge: Judge = field(default_factory=Judge)
    score: Score = field(default_factory=Score)

    @property
    def digest(self) -> str:
        """Of all that the file says, defaults included; not of where the examples lie."""
        return digest_of({**asdict(self), "prompt": self._prompt()})

    @property
    def template_digest(self) -> str:
        """Of the prompt's texts alone."""
        return digest_of(self._prompt())

    def _prompt(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.prompt).items() if name != "few_shot"}


SECTIONS = {
    "fields": Fields,
    "prompt": Prompt,
    "sampling": SamplingOptions,
    "vote": Vote,
    "verifier": Verifier,
    "judge": Judge,
    "score": Score,
}


def load_task(path: str | Path) -> Task:
    """Read a task file, or one of eval/tasks by its name without `.toml`. Raises UserError naming file and key."""
    place = Path(path)
    if not place.exists() and (OWN_TASKS / f"{path}.toml").is_file():
        place = OWN_TASKS / f"{path}.toml"
    try:
        text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(own.stem for own in OWN_TASKS.glob("*.toml")))
        raise UserError(f"{path}: cannot be read ({error}); a file, or one of: {known}") from None
    try:
        return _examples_beside(parse_task(tomllib.loads(text)), place)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{place}: bad TOML: {error}") from None
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def parse_task(tables: Mapping[str, Any]) -> Task:
    """A task from the tables of its file. Raises UserError for an unknown key, a wrong type or a value out of range."""
    known = [own.name for own in fields(Task)]
    values: dict[str, Any] = {}
    for key, value in tables.items():
        if key not in known:
            raise ConfigError(key, value, f"no such key; did you mean {nearest(key, known)}?")
        values[key] = _section(key, value) if key in SECTIONS else typed(key, value, get_type_hints(Task)[key])
    for key in ("name", "kind"):
        if key not in values:
            raise ConfigError(key, ABSENT, "required")
    task = Task(**values)
    _check(task, tables)
    return task


def with_few_shot(task: Task, path: str | None, shots: int | None) -> Task:
    """The task with other examples: of a command's --few-shot and --shots, None: the task's own. Raises UserError."""
    prompt = task.prompt
    if path is not None:
        prompt = replace(prompt, few_shot=path, shots=None)
    if shots is not None:
        prompt = replace(prompt, shots=shots)
    task = replace(task, prompt=prompt)
    _check(task, {})
    return task


def _examples_beside(task: Task, place: Path) -> Task:
    if task.prompt.few_shot is None:
        return task
    return replace(task, prompt=replace(task.prompt, few_shot=str(place.parent / task.prompt.few_shot)))


def _section(name: str, table: Any) -> Any:
    kind = SECTIONS[name]
    if not isinstance(table, dict):
        raise ConfigError(name, table, "must be a table")
    hints = get_type_hints(kind)
    values: dict[str, Any] = {"temperature": 0.0} if name == "sampling" else {}
    for key, value in table.items():
        if key not in hints:
            raise ConfigError(f"{name}.{key}", value, f"no such key; did you mean {name}.{nearest(key, hints)}?")
        values[key] = typed(f"{name}.{key}", value, hints[key], blank=True)  # a line end is a stop text
    return kind(**values)


def _check(task: Task, tables: Mapping[str, Any]) -> None:
    """Raises ConfigError for what the types allow and makes no sense."""
    n, score, own = task.sampling.n, task.score, task.prompt
    scored = task.kind in ("choice_logprob", "perplexity")
    chat, names = task.prompt.api == "chat", names_in(task.prompt.option)
    for key, value, wrong, problem in (
        ("prompt.completion", task.prompt.completion, scored and not task.prompt.completion, "required"),
        ("prompt.option", task.prompt.option, not names <= {None, "label", "text"}, "may have {label} and {text} only"),
        ("prompt.few_shot", own.few_shot, own.few_shot and task.kind == "preference", "preference takes none"),
        ("prompt.shots", own.shots, own.shots is not None and own.few_shot is None, "needs prompt.few_shot"),
        ("prompt.shots", own.shots, own.shots is not None and own.shots < 1, "must be 1 or more"),
        ("judge.max_tokens", task.judge.max_tokens, task.judge.max_tokens < 1, "must be 1 or more"),
        ("vote.threshold", task.vote.threshold, not 1 <= task.vote.threshold <= n, f"must be 1 to sampling.n = {n}"),
        ("score.k", score.k, any(not 1 <= k <= n for k in score.k), f"must be 1 to sampling.n = {n}"),
        ("verifier.max_tokens", task.verifier.max_tokens, task.verifier.max_tokens < 1, "must be 1 or more"),
        ("verifier.temperature", task.verifier.temperature, task.verifier.temperature < 0, "must be 0 or more"),
        ("judge.audit", task.judge.audit, task.judge.audit < 0, "must be 0 or more"),
        ("judge.wrong", task.judge.wrong, _same(task.judge.wrong, task.judge.right), "must differ from judge.right"),
        ("score.penalty", score.penalty, score.penalty is not None and score.penalty < 0, "must be 0 or more"),
        ("score.rel_tol", score.rel_tol, not 0 <= score.rel_tol < 1, "must be at least 0 and below 1"),
        ("score.timeout_s", score.timeout_s, score.timeout_s <= 0, "must be > 0"),
        ("score.memory_mib", score.memory_mib, score.memory_mib < 1, "must be 1 or more"),
        ("score.workers", score.workers, score.workers < 1, "must be 1 or more"),
        ("score.rule", score.rule, score.rule == "reward" and task.kind != "preference", "is for kind = preference"),
        ("score.rule", score.rule, score.rule == "per_byte" and task.kind == "preference", "is for choice_logprob"),
        ("prompt.system", task.prompt.system, not chat and task.prompt.system is not None, "needs api chat"),
        ("sampling", ABSENT, "sampling" in tables and task.kind not in GENERATED, f"kind {task.kind} draws no samples"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(key, value, problem)


def _same(wrong: str, right: str) -> bool:
    return wrong.strip() == right.strip()
