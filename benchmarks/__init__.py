"""Timed comparisons: what each hot path costs, beside the thing it must beat, in the same run."""
