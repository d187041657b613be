"""Attacks: searches for adversarial examples.

An adversarial example is an upper bound on the distance from an input to its nearest adversarial
example. The attacks know only the problem (model, points, labels, threat model) and nothing of
certificates, so no bug that both share can move both bounds. Every tool here has `capabilities`;
`calipers tools` lists them.
"""

from calipers.attacks.adaptive_restarts import AdaptiveRestarts
from calipers.attacks.apgd import APGD
from calipers.attacks.boundary_attack import BoundaryAttack
from calipers.attacks.carlini_wagner import CarliniWagner
from calipers.attacks.ddn import DDN
from calipers.attacks.deepfool import DeepFool
from calipers.attacks.defences import BPDA, EOT, BPDALayer
from calipers.attacks.fab import FAB
from calipers.attacks.fgsm import FGSM
from calipers.attacks.finite_differences import FiniteDifferences
from calipers.attacks.fmn import FMN
from calipers.attacks.hop_skip_jump import HopSkipJump
from calipers.attacks.iterative_tightening import IterativeTightening
from calipers.attacks.mi_fgsm import MIFGSM
from calipers.attacks.multi_epsilon import MultiEpsilon
from calipers.attacks.pgd import PGD
from calipers.attacks.radius_bisection import RadiusBisection
from calipers.attacks.rays import RayS
from calipers.attacks.sigma_zero import SigmaZero
from calipers.attacks.spsa import SPSA
from calipers.attacks.square import Square
from calipers.attacks.substitution_search import SubstitutionSearch
from calipers.attacks.surrogate import QuerySchedule, distilled
from calipers.attacks.transfer import Transfer
from calipers.attacks.warm_start import WarmStarted

__all__ = [
    "APGD", "AdaptiveRestarts", "BPDA", "BPDALayer", "BoundaryAttack", "CarliniWagner", "DDN",
    "DeepFool", "EOT", "FAB", "FGSM", "FMN", "FiniteDifferences", "HopSkipJump",
    "IterativeTightening", "MIFGSM", "MultiEpsilon", "PGD", "QuerySchedule", "RadiusBisection",
    "RayS", "SPSA", "SigmaZero", "Square", "SubstitutionSearch", "Transfer", "WarmStarted",
    "distilled",
]  # fmt: skip
