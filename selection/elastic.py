"""ElasticTrainer: single tensors selected by importance and time, again every `--interval` epochs.

All tensors are ranked on one batch of training images, and a dynamic program selects
the most important ones whose backward pass fits the time budget (arXiv 2312.14227).
`--rho` is the time of a training step, forward and backward pass, as a share of a full
step's.

Differences from the published code:

* The gradients of gamma and beta have their true cost here; in the published code they cost nothing.
* The head is new and always trains, and its time is subtracted first; there it competes.
* The dynamic program is exact up to its time resolution; there it is a heuristic.
* Every importance is divided by its largest absolute value; there the magnitudes are not.
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np

from core.config import Config
from core.errors import RunError, UsageError
from core.log import log
from selection.elastic_budget import backward_share, backward_time, most_important
from selection.elastic_timing import Timings, cache_folder, gradient_function, seconds_of, tensors, timings
from selection.ranking import Selection, eligible_paths, select_weights

FACTS = ("rho_achieved_predicted", "rho_achieved_measured")


def select(network, batches: Callable, cfg: Config, importance: Callable) -> Selection:
    """Selects by one of the importances below; the other arguments are those of every scheme."""
    images, labels = next(iter(batches(cfg.batch_size, 1)))
    cost = timings(network, cfg, int(images.shape[0]))
    return _chooser(network, images, labels, cost, cfg, importance, [])(cfg.warmup_epochs)


def measure(network, cfg: Config, num_images: int) -> None:
    """Measures the times of the network's tensors, which this process then keeps."""
    timings(network, cfg, min(cfg.batch_size, num_images))


def check(network, cfg: Config, num_images: int) -> None:
    """Checks that `--rho` leaves time for a backward pass, by the times of `measure`.

    Raises:
        UsageError: if it does not, or if `--exclude_layers` matches no layer or all.
    """
    eligible_paths(network, cfg)
    assert cfg.rho is not None  # the scheme reads it
    cost = timings(network, cfg, min(cfg.batch_size, num_images))
    if backward_share(cfg.rho, cost.forward, cost.backward) <= 0:
        least = cost.forward / (cost.forward + cost.backward)
        raise UsageError(
            f"--rho must leave time for a backward pass: over {least:.3f} here, because a forward pass takes "
            f"{cost.forward:.3g} {cost.unit} of a full step's {cost.forward + cost.backward:.3g} {cost.unit} "
            f"({cost.source}). Received: {cfg.rho:g}; raise it"
            + (
                f", or delete the times in {cache_folder()} and measure on an idle machine."
                if cost.unit == "s"
                else "."
            )
        )


def update_importance(network, images, labels, cfg: Config, epoch: int) -> np.ndarray:
    """Returns -(dL/dw at w + dw) . dw of every tensor, where dw is one optimizer step on this batch.

    A new optimizer with the run's settings takes the step at the learning rate of
    `epoch`. Dropout is off, and batch normalization runs by the network's policy without
    updates. The weights are restored to the last bit.

    Args:
        network: models.Network.
        images: float32 tensor of shape (B, S, S, 3).
        labels: int tensor of shape (B,).
        cfg: Config.
        epoch: int, counted from 0.

    Returns:
        float64 array, one value per tensor, from input to output.
    """
    from models.compiling import make_optimizer  # loads Keras

    weights = tensors(network)
    optimizer = make_optimizer(cfg, cfg.num_epochs)  # a cosine over the epochs has the same rate at their starts
    optimizer.build(weights)
    optimizer.iterations.assign(epoch)
    with _gradient_pass(network) as gradients_of:
        before = [weight.numpy() for weight in weights]
        try:
            optimizer.apply(gradients_of(images, labels), weights)
            steps = [weight.numpy().astype(np.float64) - old for weight, old in zip(weights, before)]
            gradients = gradients_of(images, labels)
        finally:
            for weight, old in zip(weights, before):
                weight.assign(old)
    return np.array([-np.sum(gradient.numpy() * step) for gradient, step in zip(gradients, steps)])


def weight_magnitude(network, images, labels, cfg: Config, epoch: int) -> np.ndarray:
    """Returns the sum of absolute values of every tensor; see `update_importance`."""
    return np.array([np.abs(weight.numpy()).sum(dtype=np.float64) for weight in tensors(network)])


def gradient_magnitude(network, images, labels, cfg: Config, epoch: int) -> np.ndarray:
    """Returns the sum of the gradient's absolute values of every tensor; see `update_importance`."""
    with _gradient_pass(network) as gradients_of:
        gradients = gradients_of(images, labels)
    return np.array([np.abs(gradient.numpy()).sum(dtype=np.float64) for gradient in gradients])


@contextlib.contextmanager
def _gradient_pass(network):
    """Provides a function from a batch to the gradients of its mean loss, one per tensor."""
    from models.batchnorm import statistics_kept  # loads Keras

    with statistics_kept(network.model, network.bn_stats):
        yield gradient_function(network, tensors(network))


def restore(network, batches: Callable, cfg: Config, selection: Selection, importance: Callable) -> Selection:
    """Makes a selection from a checkpoint select again, with the times that it was made with.

    Args:
        network: models.Network.
        batches: see `selection.Scheme`.
        cfg: Config.
        selection: Selection.
        importance: function of the scheme that made the selection.
    """
    images, labels = next(iter(batches(cfg.batch_size, 1)))
    cost = Timings(**selection.files["timings.json"])
    ratios = [tuple(ratio) for ratio in selection.state["ratios"]]
    choose = _chooser(network, images, labels, cost, cfg, importance, ratios)
    return replace(selection, reselect=choose, facts=lambda: _achieved(ratios))


def _chooser(network, images, labels, cost, cfg, importance, ratios):
    """Returns the function from an epoch, counted from 0, to its Selection.

    Args:
        network, cfg, importance: as in `restore`.
        images, labels: the batch that every selection uses.
        cost: selection.elastic_timing.Timings.
        ratios: list of (epochs, predicted ratio, measured ratio), one per selection so
            far. Each selection appends its own.
    """
    every = tensors(network)
    full = gradient_function(network, every)

    def choose(epoch):
        worth = importance(network, images, labels, cfg, epoch)
        _check_finite(network, worth)
        worth = worth / (np.abs(worth).max() or 1.0)
        chosen, predicted = affordable(network, worth, cost, cfg)
        part = gradient_function(network, [weight for weight in every if weight.path in chosen])
        full_s, chosen_s = seconds_of([full, part], images, labels)
        measured = chosen_s / full_s
        ratios.append((min(cfg.interval, cfg.num_epochs - epoch), predicted, measured))
        log.info(
            "Selected %d of %d tensors. Share of a full step's time: %.3f predicted, %.3f measured; "
            "rho is %.3f", len(chosen), len(worth), predicted, measured, cfg.rho,
        )  # fmt: skip
        rows = [
            {"path": weight.path, "importance": float(value), "selected": weight.path in chosen}
            for weight, value in zip(tensors(network), worth)
        ]
        return select_weights(
            network,
            chosen,
            scores=_layer_scores(network, worth),
            details={"tensors": rows},
            files={"timings.json": asdict(cost)},
            facts=lambda: _achieved(ratios),
            state={"ratios": list(ratios)},
            reselect=choose,
        )

    return choose


def affordable(network, worth: np.ndarray, cost: Timings, cfg: Config) -> tuple[set[str], float]:
    """Returns the tensors to train within the time budget of `cfg.rho`.

    Args:
        network: models.Network.
        worth: float array, importance of every tensor, from input to output.
        cost: selection.elastic_timing.Timings.
        cfg: Config. Reads rho and exclude_layers.

    Returns:
        chosen: set of str, weight paths, the head's among them.
        ratio: float. Predicted time of a step as a share of a full one's.
    """
    assert cfg.rho is not None  # the scheme reads it
    allowed = {w.path for c in network.candidates if c.path in set(eligible_paths(network, cfg)) for w in c.weights}
    head = {weight.path for weight in network.head.weights}
    paths = [weight.path for weight in tensors(network)][::-1]  # from the output
    t_dw, t_dy = (np.array([times[path] for path in paths]) for times in (cost.t_dw, cost.t_dy))
    time_budget = backward_share(cfg.rho, cost.forward, cost.backward) * cost.backward

    own = np.array([0.0 if path in head else t for path, t in zip(paths, t_dw)])
    candidates = np.array([value if path in allowed - head else -np.inf for path, value in zip(paths, worth[::-1])])
    left = time_budget - sum(cost.t_dw[path] for path in head)
    chosen = most_important(candidates, own, t_dy, left)
    if not chosen:
        log.warning(
            "With --rho %g the backward pass may take %.3g %s, so only the head's tensors train.",
            cfg.rho, time_budget, cost.unit,
        )  # fmt: skip
    trained = sorted({*chosen, *(i for i, path in enumerate(paths) if path in head)})
    ratio = (cost.forward + backward_time(trained, t_dw, t_dy)) / (cost.forward + cost.backward)
    return {paths[i] for i in trained}, ratio


def _check_finite(network, worth):
    for weight, value in zip(tensors(network), worth):
        if not np.isfinite(value):
            raise RunError(
                f"importances must be finite. Received: {value} for {weight.path}; check the weights, or try a lower "
                "--learning_rate."
            )


def _layer_scores(network, worth):
    """Returns every candidate's sum over its tensors."""
    values = iter(worth.tolist())
    return [float(sum(next(values) for _ in candidate.weights)) for candidate in network.candidates]


def _achieved(ratios):
    epochs, predicted, measured = (np.array(column, float) for column in zip(*ratios))
    return {
        "rho_achieved_predicted": float(np.average(predicted, weights=epochs)),
        "rho_achieved_measured": float(np.average(measured, weights=epochs)),
    }
