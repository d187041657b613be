"""Certificates: proofs of lower bounds on the distance.

A certificate proves that there is no adversarial example within some distance. Complete tools also
hand over the adversarial examples that they meet. Every tool here holds `capabilities`; `calipers
tools` lists them.
"""

from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.attack_starts import RelaxationMinimizers
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.enumeration import Enumeration
from calipers.certificates.input_split import InputSplit
from calipers.certificates.linear_region import LinearRegion
from calipers.certificates.milp import MILP
from calipers.certificates.own_piece import OwnPiece
from calipers.certificates.radius import CertifiedRadius

__all__ = [
    "CROWN", "IBP", "MILP", "AlphaCROWN", "BranchAndBound", "Enumeration", "InputSplit",
    "CertifiedRadius", "LinearRegion", "RelaxationMinimizers", "OwnPiece",
]  # fmt: skip
