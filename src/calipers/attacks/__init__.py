"""Attacks: searches for adversarial examples.

An adversarial example is an upper bound on the distance from an input to its nearest adversarial
example. The attacks know only the problem (model, points, labels, threat model) and nothing of
certificates, so no bug that both share can move both bounds. Every tool here has `capabilities`;
`calipers tools` lists them.
"""

from calipers.attacks.apgd import APGD
from calipers.attacks.boundary import Boundary
from calipers.attacks.carlini_wagner import CarliniWagner
from calipers.attacks.closer import Closer
from calipers.attacks.ddn import DDN
from calipers.attacks.deepfool import DeepFool
from calipers.attacks.defences import BPDA, EOT, Through
from calipers.attacks.descent import Descent
from calipers.attacks.differences import Differences
from calipers.attacks.distil import distilled
from calipers.attacks.fab import FAB
from calipers.attacks.fmn import FMN
from calipers.attacks.guided import Guided
from calipers.attacks.hop_skip_jump import HopSkipJump
from calipers.attacks.insist import Insist
from calipers.attacks.momentum import Momentum
from calipers.attacks.nearest import Nearest
from calipers.attacks.one_step import Steepest
from calipers.attacks.pgd import PGD
from calipers.attacks.ray_search import RaySearch
from calipers.attacks.replace import Replace
from calipers.attacks.sigma_zero import SigmaZero
from calipers.attacks.spsa import SPSA
from calipers.attacks.square import Square
from calipers.attacks.transfer import Transfer

__all__ = [
    "APGD", "BPDA", "Boundary", "CarliniWagner", "Closer", "DDN", "DeepFool", "Descent",
    "Differences", "EOT", "FAB", "FMN", "Guided", "HopSkipJump", "Insist", "Momentum", "Nearest",
    "PGD", "RaySearch", "Replace", "SPSA", "SigmaZero", "Square", "Steepest", "Through", "Transfer",
    "distilled",
]  # fmt: skip
