"""How far a result may be from the truth.

The truth is the float64 oracle; the yardstick is the oracle in the result's own dtype, that is, eager torch. A result
may err at most twice as much as eager torch forward and three times backward, by its largest and by its root mean
square error, plus rounding: two units in the last place of each value, and an absolute part that is never above 1% of
the truth's RMS. A test written with an absolute tolerance above that is itself a failure, so `close` is the only door.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FORWARD, BACKWARD = 2.0, 3.0
# eager torch that is further off than this hides bugs: such a case has the wrong scale
WORST_EAGER_RMS = 0.05
# of fewer values the RMS may be what a cancellation left
FEW = 16


def rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt()) if t.numel() else 0.0


def close(
    actual: Tensor, truth: Tensor, eager: Tensor | Sequence[Tensor] | None = None, *, factor: float = FORWARD,
    what: str = "result", units: float = 2.0, magnitude: float = 0.0, of: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Asserts that actual is as near to truth as its dtype allows. Shapes and NaN must agree exactly.

    eager is the same computation in actual's dtype by plain torch, once or in several orders of its sums, of which the
    worst counts; None where rounding alone is allowed.
    units is the number of units in the last place that rounding is worth. magnitude is the size of the terms where they
    cancel and the truth is the little or nothing that is left. of is the dtype of the arithmetic, where it is narrower
    than the result's.
    """
    assert actual.shape == truth.shape, f"{what} has shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert truth.dtype == torch.float64, "the truth is float64"
    actual64 = actual.detach().double()
    truth = truth.detach().to(actual64.device)
    nan = truth.isnan()
    assert torch.equal(actual64.isnan(), nan), (
        f"{what} is NaN in {int(actual64.isnan().sum())} places, expected {int(nan.sum())}"
    )
    same_infinity = truth.isinf() & (actual64 == truth)
    keep = ~nan & ~same_infinity
    actual64, truth = actual64[keep], truth[keep]
    if truth.numel() == 0:
        return
    error = (actual64 - truth).abs()
    unit = torch.finfo(of or actual.dtype).eps / 2
    if (of or actual.dtype) == torch.float64:
        # the truth is no more exact than the result: sums of some thousand terms in another order
        units = max(units, 512.0)
    scale, largest = rms(truth), float(truth.abs().max())
    # below the smallest normal number precision is absolute
    floor = min(units * unit * largest, 0.01 * scale) + torch.finfo(actual.dtype).smallest_normal * unit * 2
    floor += units * unit * magnitude
    worst_eager = rms_eager = 0.0
    if eager is not None:
        runs = [eager] if isinstance(eager, Tensor) else eager
        errors = [(run.detach().double()[keep.to(run.device)].to(truth.device) - truth).abs() for run in runs]
        worst_eager, rms_eager = max(float(e.max()) for e in errors), max(rms(e) for e in errors)
        assert rms_eager <= max(WORST_EAGER_RMS * scale, floor) or truth.numel() < FEW, (
            f"{what}: eager torch is off by {rms_eager / scale:.1%} of the RMS: this case can't tell right from wrong"
        )
    allowed = factor * worst_eager + floor + units * unit * truth.abs()
    excess = error - allowed
    assert float(excess.max()) <= 0, (
        f"{what} is off by {float(error[excess.argmax()]):.3e} where {float(allowed[excess.argmax()]):.3e} is allowed "
        f"(truth {float(truth[excess.argmax()]):.3e}, RMS {scale:.3e}, eager torch's largest error {worst_eager:.3e}, "
        f"{int((excess > 0).sum())} of {excess.numel()} values)"
    )
    allowed_rms = factor * rms_eager + floor + units * unit * scale
    assert rms(error) <= allowed_rms, f"{what} has an RMS error of {rms(error):.3e} where {allowed_rms:.3e} is allowed"
