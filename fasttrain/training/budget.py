"""A budget of time: how many steps a run can take until its time is over."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_POINTS = (5, 10)  # steps after the start at which a run is measured first; compilation is before the first
_TOLERANCE = 0.02  # of the steps that are left; smaller corrections would only make the learning rate restless
_MEMORY = 0.8  # weight of earlier measurements
_EVALUATION = 0.4  # of a training step's time per image, before an evaluation was measured


@dataclass
class Budget:
    """Measures steps and pauses (evaluations and saves), and fits the number of steps to the time that is left.

    seconds: of the whole run. used: those of earlier processes. started: when this process started, by `clock`.
    """

    seconds: float
    used: float = 0.0
    started: float = field(default_factory=time.monotonic)
    clock: Callable[[], float] = time.monotonic
    step_seconds: float | None = None
    pause_seconds: float | None = None
    _marked: tuple[int, float] | None = None
    _points: int = 0

    @property
    def spent(self) -> float:
        """The seconds used so far, with those of earlier processes."""
        return self.used + self.clock() - self.started

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def start(self, steps_done: int) -> None:
        """The next step is the first after the start, or after the run went back."""
        self._marked, self._points = (steps_done, self.clock()), 0

    def measure(self, steps_done: int) -> None:
        """Take the time of the steps since the last measurement or pause. The device has done them."""
        now = self.clock()
        if self._marked is None or steps_done <= self._marked[0]:
            return
        step, then = self._marked
        self._marked = steps_done, now
        self._points += 1
        seconds = (now - then) / (steps_done - step)
        if self._points == 1 and self.left > (now - then) / 2:
            return  # it includes compilation and the first batches, and there is time for another one
        before = self.step_seconds
        self.step_seconds = seconds if before is None else _MEMORY * before + (1 - _MEMORY) * seconds

    def paused(self, steps_done: int) -> None:
        """Take the time since the last measurement as that of an evaluation and a save."""
        now = self.clock()
        if self._marked is not None:
            self.pause_seconds = now - self._marked[1]
        self._marked = steps_done, now

    def fit(self, steps_done: int, steps: int, steps_per_pause: int, pause_steps: float = 0.0) -> int:
        """The number of steps of the whole run. steps: what it is now. steps_per_pause: steps from one evaluation to
        the next; the last step is followed by one too, unless it has just been. pause_steps: the images of an
        evaluation, in batches of a step."""
        left = self.left
        if self.step_seconds is None:
            return steps if left > 0 else steps_done
        pause = self.pause_seconds
        if pause is None:
            pause = _EVALUATION * self.step_seconds * pause_steps
        of_a_step = self.step_seconds + pause / steps_per_pause
        fitted = steps_done + max(0, int((left - pause) / max(of_a_step, 1e-9)))
        close = abs(fitted - steps) <= _TOLERANCE * max(fitted - steps_done, 0)
        return steps if close and fitted > steps_done else fitted
