"""The record: evidence, the bracket it spans, the file it is kept in. Imports without torch."""

from calipers.record.estimates import clopper_pearson, dkw_half_width, two_sided, wilson

__all__ = ["clopper_pearson", "dkw_half_width", "two_sided", "wilson"]
