"""The epochs of a run, cut where it selects while it trains. Loads no framework, so flags are checked at once."""

from dataclasses import dataclass

from core.config import Config
from core.errors import UsageError


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


def selects_while_training(cfg: Config) -> bool:
    """Returns whether a run selects after its first epoch: at the end of a warm-up, or again."""
    return cfg.warmup_epochs > 0 or cfg.interval is not None


def check(cfg: Config) -> None:
    """Checks the flags that decide how long a selection trains.

    Raises:
        UsageError: if a warm-up leaves no epoch, or ranks without training; or if early
            stopping has no validation images.
    """
    if cfg.warmup_epochs >= cfg.num_epochs:
        raise UsageError(
            f"--warmup_epochs must be less than --num_epochs: the selection follows the warm-up. Received: "
            f"{cfg.warmup_epochs} of {cfg.num_epochs}; lower it."
        )
    if cfg.warmup_epochs and cfg.select_only:
        raise UsageError(
            f"--select_only trains nothing. Received: --warmup_epochs {cfg.warmup_epochs} too; leave out one of them."
        )
    if cfg.early_stopping is not None and cfg.protocol == "paper":
        raise UsageError(
            f"--early_stopping needs validation images. Received: {cfg.early_stopping} with --protocol paper; leave it "
            "out, or use --protocol validation."
        )


def plan_segments(
    num_epochs: int, interval: int, epochs_done: int = 0, steps_done: int = 0, warmup_epochs: int = 0
) -> list[Segment]:
    """Returns the segments that are left to train.

    A checkpoint at the border of two segments belongs to the earlier one: the later
    one begins with a selection, which the checkpoint does not have.

    Args:
        num_epochs: int. Epochs of the whole run.
        interval: int. Epochs between two selections; at least `num_epochs` for a
            scheme that selects once.
        epochs_done: int. Epochs that the checkpoint has finished.
        steps_done: int. Steps of the next epoch that the checkpoint has finished.
        warmup_epochs: int. Epochs before the first selection of the scheme.
    """
    resumes = epochs_done > 0 or steps_done > 0
    begun = epochs_done if steps_done else max(epochs_done - 1, 0)
    starts = sorted({0, *range(warmup_epochs, num_epochs, interval)})
    left = [(start, end) for start, end in zip(starts, [*starts[1:], num_epochs]) if end > begun]
    return [
        Segment(
            first=max(start, epochs_done),
            end=end,
            selects=start > 0 and not (resumes and number == 0),
            resumes=resumes and number == 0,
        )
        for number, (start, end) in enumerate(left)
    ]
