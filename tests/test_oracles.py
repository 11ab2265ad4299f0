"""A real model on real pairs gives the numbers that transformers and TRL gave (tests/golden, and ../shared/oracles).

Those numbers were made in float32 on padded batches. Tolerances: 1e-4 nats a token for log-probs, 1e-5 for a loss from
the same log-probs, 3e-4 relative for gradient norms.
"""

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_tools.encode import Group
from trainer.batch import Stream, build_stream
from trainer.config import LossConfig
from trainer.losses import preference_loss
from trainer.models import decoder
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import hf_name, load_decoder
from trainer.models.tied_embedding import embed_tied
from trainer.objective import Objective, Terms, group_weights, pair_sums

GOLDEN = Path(__file__).parent / "golden"
PHASES = ("init", "perturbed")
BATCHES = range(4)
PAIRS_A_BATCH = 4
PER_TOKEN = 1e-4
PER_LOSS = 1e-5
PER_NORM = 3e-4


@dataclass
class Models:
    """The reference, and the policy of each phase."""

    init: Decoder
    perturbed: Decoder


@pytest.fixture(scope="module")
def models(smollm2_dir: Path) -> Models:
    init = load_decoder(smollm2_dir)
    perturbed = copy.deepcopy(init)
    with torch.no_grad():
        for layer in perturbed.layers:
            layer.mlp.down_proj.weight.mul_(0.97)
    return Models(init, perturbed)


class Oracle:
    """One file of DPO and ORPO numbers, and our log-probs of its batches, computed when first asked for."""

    def __init__(self, path: Path, models: Models) -> None:
        self.path = path
        self.models = models
        self.content = json.loads(path.read_text(encoding="utf-8"))
        self.beta = self.content["config"]["beta"]
        self._logps: dict[tuple[str, str, int], Tensor] = {}

    def expected(self, kind: str, phase: str, batch: int) -> dict:
        """TRL's numbers of one batch; `kind` is dpo or orpo."""
        (found,) = (b for b in self.content[kind]["batches"] if (b["phase"], b["batch"]) == (phase, batch))
        return found

    @cached_property
    def groups(self) -> dict[str, list[Group]]:
        """All pairs, from the exact token ids. TRL's ORPO puts one more end token behind each completion."""
        return {
            "dpo": [
                pair_of(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
                for row in self.content["dpo"]["tokens"]
            ],
            "orpo": [orpo_pair(row) for row in self.content["orpo"]["tokens"]],
        }

    def batch(self, kind: str, batch: int) -> tuple[list[Group], Stream]:
        groups = self.groups[kind][batch * PAIRS_A_BATCH : (batch + 1) * PAIRS_A_BATCH]
        return groups, build_stream(groups, score_prompt=kind == "orpo")

    def logps(self, kind: str, phase: str, batch: int) -> Tensor:
        """(N,) our log-probs of the policy of `phase`, without gradient."""
        key = (kind, phase, batch)
        if key not in self._logps:
            with torch.no_grad():
                self._logps[key] = getattr(self.models, phase)(self.batch(kind, batch)[1])
        return self._logps[key]

    def terms(self, kind: str, batch: int, policy: Tensor, reference: Tensor | None, **options: object) -> Terms:
        """Our loss and metrics of a batch from (N,) log-probs."""
        groups, stream = self.batch(kind, batch)
        objective = Objective(kind, LossConfig(**{"beta": self.beta, **options}))
        return objective.terms(policy, reference, stream, group_weights(groups), objective.count(groups))


def pair_of(prompt: list[int], chosen: list[int], rejected: list[int]) -> Group:
    spans = ((), ((0, len(chosen)),), ((0, len(rejected)),))
    ids = np.array(prompt + chosen + rejected, dtype=np.int32)
    return Group("row", ids, (len(prompt), len(chosen), len(rejected)), spans)


def orpo_pair(row: dict) -> Group:
    prompt, chosen, rejected = (row[f"{name}_input_ids"] for name in ("prompt", "chosen", "rejected"))
    start = len(prompt)
    assert chosen[:start] == rejected[:start] == prompt
    assert [token for token in row["chosen_labels"] if token != -100] == chosen[start:]
    return pair_of(prompt, chosen[start:], rejected[start:])


@pytest.fixture(scope="module")
def own(models: Models) -> Oracle:
    return Oracle(GOLDEN / "own_dpo_orpo.json", models)


@pytest.fixture(scope="module")
def trl(models: Models, shared_dir: Path) -> Oracle:
    return Oracle(shared_dir / "oracles" / "trl_dpo_orpo.json", models)


def rest_is_long(phases_and_batches: list[tuple[str, int]]) -> pytest.MarkDecorator:
    """All phases and batches; those not named take minutes in all and are marked so."""
    every = [(phase, batch) for phase in PHASES for batch in BATCHES]
    marks = {True: (), False: (pytest.mark.long,)}
    cases = [pytest.param(*case, marks=marks[case in phases_and_batches]) for case in every]
    return pytest.mark.parametrize(("phase", "batch"), cases)


# --- one text --------------------------------------------------------------------------------------------------------


def test_forward_of_one_text(models: Models) -> None:
    oracle = np.load(GOLDEN / "smollm2_forward.npz")
    ids = oracle["ids"].astype(np.int32)
    stream = build_stream([Group("text", ids, (len(ids),), ((),))], score_prompt=True)
    after_first: list[Tensor] = []
    hook = models.init.layers[0].register_forward_hook(lambda _module, _inputs, output: after_first.append(sum(output)))
    with torch.no_grad():
        found = {
            "token_logps": models.init(stream),
            "hidden_embed": models.init.embed_tokens(stream.tokens),
            "hidden_final_normed": models.init(stream, output="hidden"),
            "logits_last4": models.init(stream, output="logits")[-4:],
            "hidden_layer1": after_first[0][: len(ids)],  # the stream is padded inside
        }
    hook.remove()
    for name, ours in found.items():
        np.testing.assert_allclose(ours.numpy(), oracle[name], rtol=0, atol=PER_TOKEN, err_msg=name)


# --- log-probs -------------------------------------------------------------------------------------------------------


def check_dpo_logps(oracle: Oracle, phase: str, batch: int) -> None:
    _, stream = oracle.batch("dpo", batch)
    expected = oracle.expected("dpo", phase, batch)
    for prefix, model in (("policy", phase), ("ref", "init")):
        sums, tokens = pair_sums(oracle.logps("dpo", model, batch), stream)
        for side in ("chosen", "rejected"):
            off = (getattr(sums, side) - torch.tensor(expected[f"{prefix}_{side}"])).abs() / getattr(tokens, side)
            assert off.max() <= PER_TOKEN, (prefix, side)


def check_orpo_logps(oracle: Oracle, phase: str, batch: int) -> None:
    _, stream = oracle.batch("orpo", batch)
    expected = oracle.expected("orpo", phase, batch)
    sums, tokens = pair_sums(oracle.logps("orpo", phase, batch), stream)
    for side in ("chosen", "rejected"):
        means = getattr(sums, side) / getattr(tokens, side)
        torch.testing.assert_close(means, torch.tensor(expected[f"mean_logp_{side}"]), rtol=0, atol=PER_TOKEN)


# --- losses and metrics ----------------------------------------------------------------------------------------------


def spread(stream: Stream, sums: Tensor) -> Tensor:
    """(N,) log-probs whose sums are those of TRL: each token of a segment gets the same."""
    return (sums.double() / stream.segment_tokens).index_select(0, stream.score_segments)


def check_dpo_loss(oracle: Oracle, phase: str, batch: int) -> None:
    _, stream = oracle.batch("dpo", batch)
    expected = oracle.expected("dpo", phase, batch)
    theirs = []
    for prefix in ("policy", "ref"):
        sums_P3 = torch.zeros(PAIRS_A_BATCH, 3)
        sums_P3[:, 1], sums_P3[:, 2] = (torch.tensor(expected[f"{prefix}_{side}"]) for side in ("chosen", "rejected"))
        theirs.append(spread(stream, sums_P3.view(-1)))
    per_pair = preference_loss("sigmoid", *(pair_sums(each, stream)[0] for each in theirs), None, beta=oracle.beta)
    torch.testing.assert_close(per_pair.float(), torch.tensor(expected["per_pair_loss"]), rtol=0, atol=PER_LOSS)
    assert oracle.terms("dpo", batch, *theirs).loss.item() == pytest.approx(expected["loss"], abs=PER_LOSS)

    ours = oracle.terms("dpo", batch, oracle.logps("dpo", phase, batch), oracle.logps("dpo", "init", batch))
    assert ours.loss.item() == pytest.approx(expected["loss"], abs=5e-5)
    for name, value in expected["metrics"].items():
        if name.startswith(("rewards/", "logps/")):
            # logps are means of sums over some hundred tokens; rewards are beta times a difference of such sums
            allowed = 2e-3 if name.startswith("logps/") else 2e-4
            assert ours.sums[name].item() == pytest.approx(value, abs=allowed), name


def check_orpo_loss(oracle: Oracle, phase: str, batch: int) -> None:
    _, stream = oracle.batch("orpo", batch)
    expected = oracle.expected("orpo", phase, batch)
    tokens_P3 = stream.segment_tokens.view(-1, 3)
    sums_P3 = torch.zeros(PAIRS_A_BATCH, 3, dtype=torch.float64)
    for column, side in ((1, "chosen"), (2, "rejected")):
        sums_P3[:, column] = torch.tensor(expected[f"mean_logp_{side}"]).double() * tokens_P3[:, column]
    # the NLL is a mean over all tokens of prompt and chosen: what is left of it belongs to the prompts
    all_tokens = tokens_P3[:, :2].sum().item()
    sums_P3[0, 0] = -expected["nll_chosen_full_sequence"] * all_tokens - sums_P3[:, 1].sum().item()
    theirs = oracle.terms("orpo", batch, spread(stream, sums_P3.view(-1)), None)
    assert theirs.loss.item() == pytest.approx(expected["loss"], abs=PER_LOSS)
    ours = oracle.terms("orpo", batch, oracle.logps("orpo", phase, batch), None)
    assert ours.loss.item() == pytest.approx(expected["loss"], abs=5e-5)
    for name, value in {
        "nll_loss": expected["nll_chosen_full_sequence"],
        "log_odds_chosen": np.mean(expected["log_odds"]),
        "log_odds_ratio": np.mean(expected["log_sigmoid_log_odds"]),
    }.items():
        for terms, allowed in ((theirs, PER_LOSS), (ours, PER_TOKEN)):
            assert terms.sums[name].item() == pytest.approx(value, abs=allowed), name


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("phase", PHASES)
def test_dpo(own: Oracle, phase: str, batch: int) -> None:
    check_dpo_logps(own, phase, batch)
    check_dpo_loss(own, phase, batch)


@rest_is_long([("perturbed", 0), ("perturbed", 3)])
def test_orpo(own: Oracle, phase: str, batch: int) -> None:
    check_orpo_logps(own, phase, batch)
    check_orpo_loss(own, phase, batch)


@rest_is_long([("perturbed", 2)])
def test_dpo_of_trl(trl: Oracle, phase: str, batch: int) -> None:
    check_dpo_logps(trl, phase, batch)
    check_dpo_loss(trl, phase, batch)


@rest_is_long([])
def test_orpo_of_trl(trl: Oracle, phase: str, batch: int) -> None:
    check_orpo_logps(trl, phase, batch)
    check_orpo_loss(trl, phase, batch)


def check_length_desensitised_losses(oracle: Oracle, path: Path) -> None:
    """The cases that no sums can serve: LD-DPO weighs single tokens."""
    cases = [case for case in json.loads(path.read_text(encoding="utf-8"))["cases"] if "ld_alpha" in case]
    assert cases
    logps = oracle.logps("dpo", "perturbed", 0), oracle.logps("dpo", "init", 0)
    for case in cases:
        loss = oracle.terms("dpo", 0, *logps, loss_type=tuple(case["loss_type"]), ld_alpha=case["ld_alpha"]).loss
        assert loss.item() == pytest.approx(case["loss"], abs=5e-5)


def test_ld_dpo(own: Oracle) -> None:
    check_length_desensitised_losses(own, GOLDEN / "own_losses.json")


@pytest.mark.long
def test_ld_dpo_of_trl(trl: Oracle, shared_dir: Path) -> None:
    check_length_desensitised_losses(trl, shared_dir / "oracles" / "trl_losses.json")


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pad_token_like_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers gives the lookup of config.json's pad token no gradient, although id 2 also ends every turn here."""

    def embed(weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        rows, head = embed_tied(weight, tokens)
        return torch.where((tokens == 2)[:, None], rows.detach(), rows), head

    monkeypatch.setattr(decoder, "embed_tied", embed)


def check_gradients(oracle: Oracle, kind: str, phase: str, batch: int) -> None:
    model = getattr(oracle.models, phase)
    _, stream = oracle.batch(kind, batch)
    reference = oracle.logps("dpo", "init", batch) if kind == "dpo" else None
    oracle.terms(kind, batch, model(stream), reference).loss.backward()
    gradients = {hf_name(name): parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = oracle.expected(kind, phase, batch)["grad"]
    norms = {name: torch.linalg.vector_norm(g, dtype=torch.float64).item() for name, g in gradients.items()}
    assert np.hypot.reduce(list(norms.values())) == pytest.approx(expected["global_norm"], rel=PER_NORM)
    for name, value in expected["norms"].items():
        assert norms[name] == pytest.approx(value, rel=PER_NORM), name
    for name, values in expected["first4"].items():
        off = np.abs(gradients[name].flatten()[:4].numpy() - values).max()
        typical = norms[name] / gradients[name].numel() ** 0.5
        assert off <= PER_NORM * (typical + np.abs(values).max()), name


@rest_is_long([("perturbed", 0)])
@pytest.mark.usefixtures("pad_token_like_transformers")
def test_dpo_gradients(own: Oracle, phase: str, batch: int) -> None:
    check_gradients(own, "dpo", phase, batch)


@rest_is_long([("perturbed", 1)])
@pytest.mark.usefixtures("pad_token_like_transformers")
def test_orpo_gradients(own: Oracle, phase: str, batch: int) -> None:
    check_gradients(own, "orpo", phase, batch)


@rest_is_long([])
@pytest.mark.usefixtures("pad_token_like_transformers")
def test_dpo_gradients_of_trl(trl: Oracle, phase: str, batch: int) -> None:
    check_gradients(trl, "dpo", phase, batch)


@rest_is_long([])
@pytest.mark.usefixtures("pad_token_like_transformers")
def test_orpo_gradients_of_trl(trl: Oracle, phase: str, batch: int) -> None:
    check_gradients(trl, "orpo", phase, batch)
