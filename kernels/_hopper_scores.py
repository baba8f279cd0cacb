"""What is done to tiles of scores in Hopper's attention kernels: masks, caps, exponentials."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._common import LOG2E
from .hopper import reciprocal

# An r, see `of_capped`, of which p is 0 and its derivative finite.
HIDDEN = gl.constexpr(1e18)


@gluon.jit
def mask(s, last, window):
    """Scores with -inf in the columns after `last` of each row, and in those before the last `window` up to there."""
    col = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    seen = col[None, :] <= last[:, None]
    if window is not None:
        seen = seen & (col[None, :] > (last - window)[:, None])
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def capped(s, cap):
    """cap * tanh(s / cap), by tanh(x) = 1 - 2 / (1 + e^2x). Next to 0 this is off by up to 2^-22 of the cap, and the
    exponential by as much times the scaled cap: at 256, 2^-14, a fraction of what rounding to float16 takes."""
    return cap - (2.0 * cap) * reciprocal(1.0 + gl.exp2(s * (2.0 * LOG2E / cap)))


@gluon.jit
def exponentials(s, m, scale, CAUSAL: gl.constexpr):
    """e^(s - new maximum), the new maximum, and the factor for sums up to now; `scale` includes log2 e."""
    m_new = gl.maximum(m, gl.max(s, 1))
    # A row that has seen no key yet has maximum -inf; subtracting 0 instead keeps its exponentials 0, not NaN.
    base = (gl.where(m_new == -float("inf"), 0.0, m_new) if CAUSAL else m_new) * scale
    return gl.exp2(s * scale - base[:, None]), m_new, gl.exp2(m * scale - base)


@gluon.jit
def masked(p, hidden, n0, m0, n_queries, n_keys, window, CAUSAL: gl.constexpr):
    """p (keys n0.., queries m0..), but `hidden` of keys that there are not or that the query does not see."""
    rows: gl.constexpr = gl.SliceLayout(0, p.type.layout)
    key = n0 + gl.arange(0, p.shape[0], layout=gl.SliceLayout(1, p.type.layout))
    last = n_keys - 1 + gl.zeros([p.shape[1]], gl.int32, layout=rows)
    if CAUSAL:
        last = gl.minimum(last, m0 + n_keys - n_queries + gl.arange(0, p.shape[1], layout=rows))
    seen = key[:, None] <= last[None, :]
    if window is not None:
        seen = seen & (key[:, None] > (last - window)[None, :])
    return gl.where(seen, p, hidden)


@gluon.jit
def of_capped(r, base, cap):
    """p times tanh's derivative, and p, from r = 1 / (1 + e^2x), where tanh(x) = 1 - 2 r. Masks are put on r, so that
    only one number a score is held while it is decided whether one is needed."""
    p = gl.exp2((cap * LOG2E - base)[None, :] - r * (2.0 * LOG2E * cap))
    return p * (r * (4.0 - 4.0 * r)), p
