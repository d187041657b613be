"""The referee: what may enter the record.

Only what the referee has verified itself: it runs the model, checks that points lie in the threat
set and measures distances. Tools only propose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calipers.errors import Contradiction, UnsupportedOp
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim
from calipers.problem.votes import median_worst
from calipers.record.evidence import Evidence

CLEAN = "clean prediction"
_SPOT_CHECKS = (
    4  # random points inside each claimed region; a claim that fails at one is certainly wrong
)


@dataclass(frozen=True)
class Ruling:
    """Facts to record at once, and the attempts of the tool.

    `evidence` holds witnesses and certificates, `tried` one attempt for each point that the tool
    was tried on.
    """

    evidence: tuple[Evidence, ...]
    tried: tuple[Evidence, ...]


class Referee:
    """Admits evidence about one problem.

    Distances are float64 in native units; comparisons are exact.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def open(self, index: Tensor) -> list[Evidence]:
        """Return the model's outputs at the points themselves, as evidence.

        These are clean facts, witnesses at distance 0 where the model is wrong, and points that
        cannot be measured.
        """
        part = self.problem.take(index)
        x = part.x.nan_to_num(0.0)
        if part.classifier.samples:
            worst, answer, finite = _by_vote(part, x)
            wrong = is_adversarial(worst)
        else:
            logits, exact = part.classifier.logits(x), part.classifier.logits64(x)
            worst, answer, finite = (
                part.goal.worst(part.margins(logits)),
                logits.argmax(1),
                logits.isfinite().all(1),
            )
            wrong = is_adversarial(worst) | is_adversarial(part.goal.worst(part.margins(exact)))
        facts = []
        for i, name in enumerate(part.names):
            reason = _cannot_measure(part.x[i], bool(finite[i]))
            if reason:
                facts.append(Evidence(name, "invalid", CLEAN, note=reason))
                continue
            facts.append(
                Evidence(
                    name,
                    "clean",
                    CLEAN,
                    0.0,
                    float(worst[i]),
                    prediction=int(answer[i]),
                    forwards=1,
                )
            )
            if bool(wrong[i]):
                facts.append(
                    Evidence(
                        name,
                        "witness",
                        CLEAN,
                        0.0,
                        float(worst[i]),
                        prediction=int(answer[i]),
                        array=part.x[i].cpu().numpy(),
                    )
                )
        return facts

    def attempt(self, attempt: Attempt, index: Tensor, tool: str, seconds: float) -> Ruling:
        """Rule on candidates for adversarial examples.

        `index` maps the tool's places to the problem's. A candidate that is no witness leaves only
        the note that it was tried.

        A witness is finite, inside the box, equal to its point where the mask says so, and
        misclassified by the model in a batch, alone, and in float64; by a random model in at least
        half of its declared fresh draws. Its distance says for which radii it counts.
        """
        part = self.problem.take(index[attempt.index])
        points = attempt.candidate.to(part.x)
        good, worst, answer = self._misclassified(part, points)
        distance = part.region.distance(points)
        good &= part.region.at(distance).contains(points) & (distance > 0)
        share = seconds / max(1, len(part))
        facts, tried, asked = [], [], part.threat.radii(len(part)).tolist()
        margins, answers, found = worst.tolist(), answer.tolist(), distance.tolist()
        forwards, backwards = attempt.forwards.tolist(), attempt.backwards.tolist()
        arrays = points.cpu().numpy()
        admitted = set(torch.nonzero(good).flatten().tolist())
        for i, name in enumerate(part.names):
            tried.append(
                Evidence(
                    name,
                    "attempt",
                    tool,
                    asked[i],
                    margins[i],
                    prediction=answers[i],
                    forwards=forwards[i],
                    backwards=backwards[i],
                    seconds=share,
                )
            )
            if i in admitted:
                facts.append(
                    Evidence(
                        name,
                        "witness",
                        tool,
                        found[i],
                        margins[i],
                        "replayed",
                        answers[i],
                        array=arrays[i].copy(),
                        asked_radius=asked[i],
                    )
                )
        return Ruling(tuple(facts), tuple(tried))

    def _misclassified(self, part: Problem, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = part.classifier
        if model.samples:
            worst, answer, finite = _by_vote(part, points)
            return is_adversarial(worst) & finite, worst, answer
        return part.fooled(points)

    def claim(self, claim: Claim, index: Tensor, tool: str, seconds: float, seed: int) -> Ruling:
        """Rule on claims of a certifier.

        Each must be about a point that the model classifies correctly, and survive random points of
        its own region; otherwise `Contradiction` is raised. About a random model nothing is
        admitted (`UnsupportedOp`): what holds for one draw does not hold for the next.
        """
        if self.problem.classifier.samples:
            raise UnsupportedOp(
                f"{tool} proves what holds for one function, but this model answers at random: "
                "attack it, or measure it without its randomness"
            )
        part = self.problem.take(index[claim.index])
        radius = claim.radius.to(part.x.device)
        proved = (radius > 0) & radius.isfinite() & (claim.margin.to(radius) > 0)
        self._spot_check(part, torch.where(proved, radius, 0.0), tool, seed)
        share = seconds / max(1, len(part))
        facts, tried, asked = [], [], part.threat.radii(len(part)).tolist()
        proofs, radii = claim.proofs or (None,) * len(part), radius.tolist()
        margins, forwards = claim.margin.tolist(), claim.forwards.tolist()
        backwards, admitted = (
            claim.backwards.tolist(),
            set(torch.nonzero(proved).flatten().tolist()),
        )
        for i, (name, proof) in enumerate(zip(part.names, proofs, strict=True)):
            tried.append(
                Evidence(
                    name,
                    "attempt",
                    tool,
                    asked[i],
                    margins[i],
                    claim.guarantee,
                    forwards=forwards[i],
                    backwards=backwards[i],
                    seconds=share,
                )
            )
            if i in admitted:
                facts.append(
                    Evidence(
                        name,
                        "certificate",
                        tool,
                        radii[i],
                        margins[i],
                        claim.guarantee,
                        array=None if proof is None else np.frombuffer(proof, np.uint8),
                        asked_radius=asked[i],
                    )
                )
        return Ruling(tuple(facts), tuple(tried) if claim.final else ())

    def _spot_check(self, part: Problem, radius: Tensor, tool: str, seed: int) -> None:
        region = part.at(radius).region
        for k in range(_SPOT_CHECKS):
            points = part.x if k == 0 else region.snap(region.sample(part.streams(seed).fork(k)))
            # NaN logits do not count as robust either
            bad = is_adversarial(part.clearance(points)) & (radius > 0)
            if bool(bad.any()):
                i = int(torch.nonzero(bad)[0])
                raise Contradiction(
                    f"point {part.names[i]}: {tool} certifies {float(radius[i]):.9g}, but a random "
                    f"point at distance {float(region.distance(points)[i]):.9g} is adversarial. "
                    "The certifier is wrong; nothing of this claim was recorded. Please report it "
                    "with the model."
                )


def _by_vote(part: Problem, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the median margin, the commonest class and finiteness.

    For a random model: the median worst margin (N,) over fresh draws, the most frequent class, and
    whether all draws were finite.
    """
    answers = part.classifier.ballot(points)
    return (
        median_worst(answers, part.y, part.goal),
        answers.argmax(2).mode(0).values,
        answers.isfinite().all(2).all(0),
    )


def _cannot_measure(x: Tensor, finite: bool) -> str:
    if not bool(x.isfinite().all()):
        return "the input holds NaN or infinity"
    return "" if finite else "the model's logits are not finite at this point"
