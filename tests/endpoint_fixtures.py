"""What the tests of the endpoint's client share: a quick configuration, questions, answers by prompt. Not a test."""

from typing import Any

from data_tools.endpoint_client import Result
from data_tools.endpoint_config import EndpointConfig
from data_tools.endpoint_limits import RetryPolicy
from data_tools.endpoint_request import Question, Sampling

QUICK = RetryPolicy(retries=3, first_s=0.01, longest_s=0.05, longest_retry_after_s=5)


def config(url: str, **more: Any) -> EndpointConfig:
    return EndpointConfig(**({"base_url": url, "model": "m", "retry": QUICK, "concurrency": 4} | more))


def ask(*prompts: str, n: int = 1, **sampling: Any) -> list[Question]:
    settings = Sampling(n=n, **({"seed": 10} | sampling))
    return [Question(id=f"id-{p}", prompt=p, sampling=settings, samples=tuple(range(n))) for p in prompts]


def texts(results: list[Result]) -> dict[tuple[str, int], str | None]:
    return {(r.question.prompt, r.sample): r.answer and r.answer.text for r in results}  # type: ignore[misc]
