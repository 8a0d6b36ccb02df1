"""`cce_unbiased`: an entry P < eps is kept with probability P / eps and then counts as eps, so the expected gradient is
exact.

The variance of an entry is P (eps - P). In dE it meets the classifier's rows less the mean of those kept for the other
half of the tokens, a control variate: the sum of a row of dZ is known.

Draws come from a counter-based hash of (seed, row, column).
Sources: Wangni et al., Gradient sparsification for communication-efficient distributed optimization, NeurIPS 2018;
Cochran, Sampling Techniques, 1977, chapter 7 (difference estimators)."""

from cce_precision.numerics import Filter, FilterKind, Granularity, Operand, Variant

STOCHASTIC = Filter(FilterKind.STOCHASTIC, Granularity.ELEMENT)

VARIANT = Variant(
    name="cce_unbiased",
    summary="entries below eps sampled without bias, fp32 sums",
    filter_e=STOCHASTIC,
    filter_c=STOCHASTIC,
    operand=Operand.FP32,
    centred=True,
)
