"""The epochs of a run, cut where the scheme selects again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Consecutive epochs that train under one selection.

    Attributes:
        first: int. The first epoch left to train, counted from 0.
        end: int. The epoch after the last.
        selects: bool. Whether a new selection comes before the first epoch.
        resumes: bool. Whether a checkpoint is restored before the first epoch.
    """

    first: int
    end: int
    selects: bool
    resumes: bool


def plan_segments(num_epochs: int, interval: int, epochs_done: int = 0, steps_done: int = 0) -> list[Segment]:
    """Returns the segments that are left to train.

    A checkpoint at the border of two segments belongs to the earlier one: the later
    one begins with a selection, which the checkpoint does not have.

    Args:
        num_epochs: int. Epochs of the whole run.
        interval: int. Epochs between two selections; at least `num_epochs` for a
            scheme that selects once.
        epochs_done: int. Epochs that the checkpoint has finished.
        steps_done: int. Steps of the next epoch that the checkpoint has finished.
    """
    resumes = epochs_done > 0 or steps_done > 0
    begun = epochs_done if steps_done else max(epochs_done - 1, 0)
    starts = range(begun // interval * interval, num_epochs, interval)
    return [
        Segment(
            first=max(start, epochs_done),
            end=min(start + interval, num_epochs),
            selects=start > 0 and not (resumes and start == starts[0]),
            resumes=resumes and start == starts[0],
        )
        for start in starts
    ]
