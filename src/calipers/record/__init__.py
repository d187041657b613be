"""The record: evidence, brackets, and the file that keeps them.

This package can be imported without torch.
"""

from calipers.record.estimates import clopper_pearson, dkw_half_width, two_sided, wilson

__all__ = ["clopper_pearson", "dkw_half_width", "two_sided", "wilson"]
