"""What can end a run from outside, each explained in one line with what to do."""

import contextlib
import errno
import re
from collections.abc import Iterator

from core import environment, signals
from core.errors import RunError, UsageError, one_line
from core.log import log
from core.units import MB
from run.report import Progress, summary_record
from selection import SCHEMES


@contextlib.contextmanager
def summarized(run: Progress) -> Iterator[None]:
    """Writes summary.json if the run fails or a signal ends it, and explains known failures.

    Raises:
        RunError: for a failure that `explain` knows.
    """
    try:
        yield
    except BaseException as error:
        signals.hold()  # a second signal must not cost the summary
        is_signal = isinstance(error, tuple(signals.EXCEPTIONS.values()))
        run.result.status = "interrupted" if is_signal else "failed"
        if not run.cfg.select_only:
            with contextlib.suppress(OSError):  # the first failure is the one to report
                run.folder.write_json("summary.json", summary_record(run))
        if is_signal:
            log.info("To resume: python main.py --resume %s", run.folder.path)
        message = explain(error, run)
        if message is None:
            raise
        raise RunError(message) from error


def explain(error: BaseException, run: Progress) -> str | None:
    """Returns one line about a failure with an outside cause, or None for any other."""
    name = type(error).__name__  # recognizes TensorFlow's classes without importing TensorFlow
    folder = run.folder.path
    if not folder.is_dir() and (isinstance(error, OSError) or name == "NotFoundError"):
        return (
            f"the run folder must stay until the run ends. Received: {folder}, which is gone with all its files; start "
            "the run again."
        )
    # Before memory: TensorFlow's own writers raise ResourceExhaustedError for a full disk, too.
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(
        "No space left on device|File too large|Disk quota exceeded", str(error)
    ):
        return (
            f"the disk must have room for the run folder. Received: {error}; free some space, then continue with "
            f"--resume {folder}: the files written so far are intact."
        )
    if isinstance(error, MemoryError) or name == "ResourceExhaustedError":
        return _explain_memory(run)
    if name in ("NotFoundError", "DataLossError"):
        found = re.search(r"(\S+); No such file or directory", str(error))
        what = f"{found[1]}, which is gone" if found else one_line(error)
        return (
            f"the data must not change while a run reads them. Received: {what}; restore that, then continue with "
            f"--resume {folder}."
        )
    return None


def _explain_memory(run):
    """Names the memory that was needed, and the largest batch that is estimated to fit."""
    import tensorflow as tf

    from memory import estimate
    from training import features

    cfg, model = run.cfg, run.network.model
    trained = [weight.path for weight in run.network.trainable_weights if weight.trainable]
    reads = SCHEMES[cfg.train_type].reads
    is_selecting = run.selection is None
    uses_points = is_selecting and "betti_points" in reads
    flag = "--betti_points" if uses_points else "--batch_size"
    num_images = (uses_points and cfg.betti_points) or run.images.batch_size

    def needed(num_images):
        if is_selecting:
            return estimate.of_inference(model, (num_images, *model.inputs[0].shape[1:])).bytes
        return features.peak_bytes(run.network, run.images, cfg, trained, num_images)

    # The allocator's peak when it failed is what this machine can give.
    available = tf.config.experimental.get_memory_info(environment.device())["peak"]
    step = "the selection's forward pass" if is_selecting else "a training step"
    try:
        needed_bytes = needed(num_images)
    except UsageError:  # the memory of this network cannot be estimated
        return (
            f"out of memory: {step} on {num_images} images needs more than the {available / MB:.0f} MB that were "
            f"available; lower {flag} or --input_size."
        )
    fitting = num_images // 2
    while fitting and needed(fitting) > available:
        fitting //= 2
    advice = [f"use {flag} {fitting}, estimated at {needed(fitting) / MB:.0f} MB" if fitting else "lower --input_size"]
    if not is_selecting and "memory_budget_mb" in reads:
        advice.append(f"--memory_budget_mb {available / MB:.0f}, which trains as many layers as fit")
    return (
        f"out of memory: {step} on {num_images} images needs {needed_bytes / MB:.0f} MB by estimate, and "
        f"{available / MB:.0f} MB were available; {', or '.join(advice)}."
    )
