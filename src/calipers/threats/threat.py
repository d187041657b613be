"""The kinds of threat model: norm balls and substitutions of symbols."""

from __future__ import annotations

from calipers.threats.ball import Ball
from calipers.threats.substitutions import Substitutions

Threat = Ball | Substitutions
"""What every problem asks of its threat: `check`, `region`, `radii`, `at`, `take`, `widest`,
`below`, `least`, `next`, `identity`.
"""
