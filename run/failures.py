"""What a run can meet from outside, each told in one line with what to do about it."""

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from selection import SCHEMES

MB = 10**6


@dataclass(frozen=True)
class Situation:
    """Where a run stood.

    Attributes:
        cfg: Config.
        folder: pathlib.Path. The run folder.
        network: models.Network.
        selection: selection.Selection, or None where it was still selecting.
        batch_size: int. Images of a training batch.
    """

    cfg: object
    folder: Path
    network: object
    selection: object
    batch_size: int


def explained(error, situation):
    """Returns what to say of an error that the world outside made, or None for any other.

    Args:
        error: Exception.
        situation: Situation.
    """
    return next((fault.tell(error, situation) for fault in FAULTS if fault.is_it(error, situation)), None)


@dataclass(frozen=True)
class Fault:
    """One row of the table: functions of (error, Situation)."""

    is_it: Callable  # -> bool
    tell: Callable  # -> str


def _name(error):
    return type(error).__name__  # TensorFlow's classes without TensorFlow


def _is_folder_gone(error, situation):
    return not situation.folder.is_dir() and (isinstance(error, OSError) or _name(error) == "NotFoundError")


def _folder_gone(error, situation):
    return (
        f"the run folder must stay while the run is at work. Received: {situation.folder}, which is gone, and with it "
        "what the run had written; start it anew."
    )


def _is_disk_full(error, situation):
    # TensorFlow's own writers say ResourceExhausted, as for memory.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(
        "No space left on device|File too large|Disk quota exceeded", str(error)
    )


def _disk_full(error, situation):
    return (
        f"the disk must have room for the run folder. Received: {error}; make room, and go on with --resume "
        f"{situation.folder}: what was written before is whole."
    )


def _is_out_of_memory(error, situation):
    return isinstance(error, MemoryError) or _name(error) == "ResourceExhaustedError"


def _out_of_memory(error, situation):
    """Says what was needed, and by the estimator the largest batch that would fit."""
    import tensorflow as tf

    from core import environment
    from memory import budget, estimate

    cfg, network = situation.cfg, situation.network
    training = [weight.path for weight in network.trainable_weights if weight.trainable]
    reads = SCHEMES[cfg.train_type].reads
    selecting = situation.selection is None
    flag, images = (
        ("--betti_points", cfg.betti_points) if selecting and "betti_points" in reads else ("--batch_size", None)
    )
    images = images or situation.batch_size

    def needs(images):
        if selecting:
            return estimate.of_inference(network.model, (images, *network.model.inputs[0].shape[1:])).bytes
        return budget.peak_bytes(network, training, cfg, images)  # compiled anew for each size: a trace has one

    # What the allocator held when it could get no more: that much there is.
    had = tf.config.experimental.get_memory_info(environment.device())["peak"]
    what = "the selection's forward pass" if selecting else "a training step"
    told = f"out of memory: {what} on {images} images needs {needs(images) / MB:.0f} MB by estimate, and {had / MB:.0f} MB were to be had"
    fitting = images // 2
    while fitting and needs(fitting) > had:
        fitting //= 2
    advice = [
        f"start anew with {flag} {fitting}, estimated at {needs(fitting) / MB:.0f} MB"
        if fitting
        else "lower --input_size"
    ]
    if not selecting and "memory_budget_mb" in reads:
        advice.append(f"with --memory_budget_mb {had / MB:.0f}, which trains as many layers as fit")
    return f"{told}; {', or '.join(advice)}."


def _is_data_gone(error, situation):
    return _name(error) in ("NotFoundError", "DataLossError")


def _data_gone(error, situation):
    found = re.search(r"(\S+); No such file or directory", str(error))
    what = f"{found[1]}, which is gone" if found else " ".join(str(error).split())[:200]
    return (
        f"the data must stay as they were while a run reads them. Received: {what}; put that back, and go on with "
        f"--resume {situation.folder}."
    )


# The first that fits is told.
FAULTS = (
    Fault(_is_folder_gone, _folder_gone),
    Fault(_is_disk_full, _disk_full),
    Fault(_is_out_of_memory, _out_of_memory),
    Fault(_is_data_gone, _data_gone),
)
