"""What every Triton kernel of the operator shares: where windows lie and how their weights follow from the logits.

The weight of tap t is exp(score_t - lse), where a score is the logit (softmax) or its log-sigmoid (normalised sigmoid) and lse is the
log-sum-exp of the scores of a window; one number per window restores all its weights. The other normalizers need no sum.
"""

import triton
import triton.language as tl


@triton.jit
def score(logit, NORMALIZER: tl.constexpr):
    """Unnormalised log-weight of a tap."""
    if NORMALIZER == "sigmoid_normalized":
        return tl.minimum(logit, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit)))
    else:
        return logit


@triton.jit
def weight(logit, lse, NORMALIZER: tl.constexpr):
    """Weight of a tap, given the log-sum-exp of its window."""
    if NORMALIZER == "none":
        return logit
    elif NORMALIZER == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-logit))
    else:
        return tl.exp(score(logit, NORMALIZER) - lse)


@triton.jit
def logit_gradient(logit, weight, gradient, mean, NORMALIZER: tl.constexpr):
    """Gradient to a logit from the gradient to its weight; mean is the sum of weight * gradient over the window."""
    if NORMALIZER == "none":
        return gradient
    elif NORMALIZER == "sigmoid":
        return weight * (1.0 - weight) * gradient
    elif NORMALIZER == "softmax":
        return weight * (gradient - mean)
    else:
        return weight * (gradient - mean) / (1.0 + tl.exp(logit))


@triton.jit
def centre(output, UP: tl.constexpr, DOWN: tl.constexpr):
    """Source row (column) on which the window of an output row (column) is centred."""
    return (output * DOWN) // UP


@triton.jit
def expand(values, AXIS: tl.constexpr):
    """Lay a vector along axis AXIS of a two-dimensional tile."""
    return tl.expand_dims(values, 1 - AXIS)


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """Tell the compiler that `value` is a multiple of ALIGN, which its launcher has checked."""
    if ALIGN == 1:
        return value
    else:
        return value // ALIGN * ALIGN


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Matrix product of two tiles, accumulated in float32."""
    if PRECISION == "ieee":
        # for the interpreter, which multiplies bfloat16 as if it were an integer
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)
