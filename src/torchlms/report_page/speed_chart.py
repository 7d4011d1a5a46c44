"""Speed chart: speed against budget, the chosen budget, and what was measured there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchlms.core.units import bytes_text, seconds_text
from torchlms.report_page import svg
from torchlms.report_page.axis import Tick, bytes_ticks, share_ticks
from torchlms.report_page.chart import Chart, Dot, Key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.fit.curve import CurvePoint
    from torchlms.report_page.run import Run
    from torchlms.report_page.step import Step

HEIGHT = 300.0
_TOP = 1.1  # of the speed without a budget


def speed_chart(run: Run, step: Step, points: Sequence[CurvePoint]) -> Chart:
    """``points`` are those of ``fit.curve``: plans that move alone. The chosen plan may also drop values."""
    dots = chosen_dots(run, step)
    budgets = [point.budget_bytes for point in points] + [budget_bytes for budget_bytes, *_ in dots]
    least, most = min(budgets, default=0), max(budgets, default=1)
    edge = 0.06 * max(most - least, most // 20, 1)
    left, right = max(0.0, least - edge), most + edge

    def x(size_bytes: float) -> float:
        return (size_bytes - left) / (right - left)

    def place(point: CurvePoint, step_s: float) -> tuple[float, float]:
        speed = step.plain_s / step_s if step_s > 0 else 1.0
        return svg.WIDTH * x(point.budget_bytes), HEIGHT * (1 - speed / _TOP)

    bound = svg.line([place(point, max(point.lower_bound_s, step.plain_s)) for point in points], "line bound")
    curve = svg.line([place(point, point.step_s) for point in points], "line curve")
    legend = (
        Key("curve", "predicted", "plans that move values", line=True),
        Key("bound", "no plan that only moves values can be faster", line=True),
    )
    return Chart(
        svg.drawing([bound, curve], height=HEIGHT, label="Predicted speed against device budget"),
        260,
        x_ticks=bytes_ticks(right, least=left, wanted=6),
        y_ticks=tuple(Tick(tick.share / _TOP, tick.label) for tick in share_ticks()),
        legend=legend if points else (),
        dots=tuple(Dot(x(size), min(1.0, speed / _TOP), key, name) for size, speed, key, name in dots),
    )


def chosen_dots(run: Run, step: Step) -> list[tuple[int, float, str, str]]:
    """Budget, speed, colour and name: of the plan, and of the steps that followed it."""
    if run.plan is None:
        return []
    size_bytes = run.plan.budget.device_bytes
    found = []
    predicted_s = run.plan.predicted.step_s
    if predicted_s > 0:
        speed = step.plain_s / predicted_s
        found.append((size_bytes, speed, "chosen", _name("this plan", size_bytes, predicted_s, speed)))
    measured_s = float(run.stats.get("measured_step_s") or 0.0)
    if measured_s > 0:
        speed = step.plain_s / measured_s
        found.append((size_bytes, speed, "measured", _name("measured", size_bytes, measured_s, speed)))
    return found


def _name(what: str, size_bytes: int, step_s: float, speed: float) -> str:
    return f"{what}: {bytes_text(size_bytes)}, step {seconds_text(step_s)}, speed {speed:.0%}"
