"""Fine-tunes a pretrained network by training only the layers with the richest topology.

    python main.py --model_name resnet50 --train_type act_norm_betti_train --rho 0.1

loads the backbone and the data set (by default digits, which ship with
scikit-learn), counts the H1 bars of every layer's activations in forward passes
alone, trains the best tenth of the layers, and writes a folder under logs/ with
the ranking, the metrics of each epoch, and a summary of accuracy, time and peak
memory. docs/usage.md describes the other flags; README.md shows results.
"""

import functools
import logging
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace

from core import environment, signals, strategy
from core.config import Config
from core.errors import RunError, UsageError
from core.log import log
from core.units import GB
from models import models_table
from run import evaluation, failures, report
from run import folder as run_folder
from run.flags import is_debug, parse
from run.report import Progress
from selection import SCHEMES, Selection
from training import caching
from training.result import Result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: list of str. Arguments without the program's name. None uses the
            process's own.

    Returns:
        int. The exit code: 0 done; 1 failed while running; 2 wrong use or bad
        input; 130 or 143 after SIGINT or SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    early_log = run_folder.set_up_logging()
    try:
        with signals.handled():
            cfg = parse(argv)
            if cfg.list_models:
                print(models_table())
                return 0
            if cfg.prepare_only:
                return prepare(cfg)
            if cfg.clear_cache:
                return clear_cache(cfg)
            if cfg.evaluate is not None:
                print(evaluation.evaluate(cfg, early_log))
                return 0
            return list_layers(cfg) if cfg.list_layers else run(cfg, early_log)
    except SystemExit as stop:  # argparse has printed --help, or what is wrong with a flag
        return stop.code
    except UsageError as error:
        return _fail(2, error, argv)
    except RunError as error:
        return _fail(1, error, argv)
    except KeyboardInterrupt:
        return _fail(130, "interrupted by SIGINT", argv)
    except signals.Terminated:
        return _fail(143, "interrupted by SIGTERM", argv)
    except Exception as error:
        return _fail(1, f"{type(error).__name__}: {error}", argv)


def run(cfg: Config, early_log: logging.Handler) -> int:
    """Loads the data, builds the network, selects, trains and reports.

    Args:
        cfg: Config.
        early_log: logging.Handler that holds the log until the run has a log.txt.

    Returns:
        int. The exit code.
    """
    run_folder.check_place(cfg)
    existing = run_folder.RunFolder(cfg, early_log) if cfg.resume and run_folder.exists(cfg) else None
    if existing and (summary := run_folder.finished_summary(existing.path)):
        existing.finish()
        log.info("%s is already finished; nothing to resume.", existing.path)
        print(report.console_block(summary))
        return 0

    environment.load_tensorflow()
    import train
    from training import checkpoint

    saved = checkpoint.latest(existing.path) if existing else None
    images, network = load(cfg, is_new=saved is None)
    folder = existing or run_folder.RunFolder(cfg, early_log)
    write_config(cfg, images, network, folder)

    run = Progress(cfg, folder, images, network)
    with failures.summarized(run):
        if saved:
            resume(run, saved)
        else:
            begin(run)
        for name, content in report.selection_files(cfg, run.selection, run.result.reselections).items():
            folder.write_json(name, content)
        if cfg.select_only:
            if cfg.save_litert:
                save_litert(run)
            print(run.selection.table())
            return 0
        report.announce_selection(network, run.result.latest_selection(run.selection), run.result.selection_s)
        if not saved:
            choose_cache(run)
            checkpoint.save_selection(folder.path, run.selection, run.result)
        train.fine_tune(run, saved)
        summary = finish(run)
    if run.result.status == "diverged":
        raise RunError(run.result.advice)
    folder.finish()
    print(report.console_block(summary))
    return 0


def load(cfg: Config, is_new: bool):
    """Returns the data and the network, after all checks of the input: nothing has been written yet.

    Args:
        cfg: Config.
        is_new: bool. Whether the run has no checkpoint. Only then a selection follows
            whose conditions are measured and checked.

    Returns:
        images: data.pipeline.Data.
        network: models.Network.
    """
    import data
    import models
    from memory import budget
    from training import features

    images = data.load(cfg)
    environment.seed_everything(cfg.seed)  # after the data, because preparing a data set draws random numbers
    devices = strategy.make(cfg)
    strategy.check_batches(devices, images.batch_size, images.split_sizes)
    with strategy.scope(devices):
        network = models.assemble(cfg, images.num_classes)
    if is_new:
        scheme = SCHEMES[cfg.train_type]
        scheme.measure(network, cfg, images.split_sizes["train"])
        scheme.check(network, cfg, images.split_sizes["train"])
    with strategy.scope(devices):
        network = models.load_weights(network, cfg)
    caching.check(cfg, network.bn_stats)
    if cfg.save_litert:
        import export

        export.check(network, cfg)
    if is_new and cfg.memory_budget_mb is not None:
        head = [weight.path for weight in network.head.weights]
        budget.check(cfg, features.peak_bytes(network, images, cfg, head))
    return images, network


def write_config(cfg: Config, images, network, folder: run_folder.RunFolder) -> None:
    """Writes config.json, after a resumed run's surroundings have been compared with its own."""
    before = run_folder.recorded(folder.path) if cfg.resume else None
    record = report.config_record(cfg, images, network, folder, before and before.get("cached"))
    report.check_same_surroundings(record, before)
    folder.write_json("config.json", record)
    log.info("Run folder: %s", folder.path)
    report.announce(cfg, images, network, environment.device())


def begin(run: Progress) -> None:
    """Selects the weights that train and measures the cost; for a warm-up, takes the head without measuring."""
    import train

    if run.cfg.warmup_epochs:
        run.selection = warm_up(run)
    else:
        run.selection = train.select(run, lambda: select(run))


def select(run: Progress) -> Selection:
    """Returns what the scheme selects."""
    from models import freeze

    freeze(run.network.model, [weight.path for weight in run.network.trainable_weights])  # it may need all gradients
    return SCHEMES[run.cfg.train_type].select(run.network, run.images.selection_batches, run.cfg)


def warm_up(run: Progress) -> Selection:
    """Returns the Selection of the head alone, which the scheme's follows when training asks again."""
    head = SCHEMES["traditional_tl_training"].select(run.network, run.images.selection_batches, run.cfg)
    return replace(head, reselect=lambda epoch: select(run))


def resume(run: Progress, saved) -> None:
    """Restores the selection and the result of a checkpoint.

    Args:
        run: Progress.
        saved: training.checkpoint.Checkpoint.
    """
    run.selection = Selection.from_record(saved.record["selection"])
    run.result = Result.from_record(saved.record["result"])
    restore = functools.partial(SCHEMES[run.cfg.train_type].restore, run.network, run.images.selection_batches, run.cfg)
    if run.cfg.warmup_epochs and not run.result.reselections:
        run.selection = warm_up(run)
    elif run.result.reselections:  # only the selection that holds has to select again
        epoch, current = run.result.reselections[-1]
        run.result.reselections[-1] = (epoch, restore(current))
    else:
        run.selection = restore(run.selection)
    log.info("Resuming after epoch %d, step %d", saved.record["epoch"], saved.record["step"])


def choose_cache(run: Progress) -> None:
    """Decides whether training reads cached features, and completes config.json."""
    from models import freeze
    from training import features

    freeze(run.network.model, run.selection)
    run.result.cached_in, message, _ = features.choose(run.network, run.images, run.cfg)
    log.info("%s", message)
    cached = run.result.cached_in != "off"
    run.folder.write_json("config.json", report.config_record(run.cfg, run.images, run.network, run.folder, cached))


def finish(run: Progress) -> dict:
    """Writes what a run leaves behind, and returns the content of summary.json."""
    done = run.result.status == "done"
    if run.cfg.save_model and done:
        run.folder.save_model(run.network.model)
    if run.cfg.save_litert and done:
        save_litert(run)
    summary = report.summary_record(run)
    if run.cfg.save_txt and done:
        run.folder.write_txt(summary)
    run.folder.write_json("summary.json", summary)
    if summary["stayed_at_chance"] and done:
        log.warning(
            "The training accuracy never exceeded chance (%.2f %% of the training images are of one class). Check the "
            "labels, or try another --learning_rate, more epochs, or pretrained --weights.",
            100 * run.images.majority_share,
        )
    return summary


def save_litert(run: Progress) -> None:
    """Writes model.tflite into the run folder."""
    import export

    trained_weights = run.result.latest_selection(run.selection).trained_weights  # after a warm-up, the scheme's
    export.write(run.network, trained_weights, run.cfg, run.folder.path / "model.tflite")


def list_layers(cfg: Config) -> int:
    """Prints the candidate layers' paths in forward order, without data or pretrained weights."""
    environment.load_tensorflow()
    import models

    network = models.assemble(cfg, cfg.num_classes or 2)
    print("\n".join(candidate.path for candidate in network.candidates))
    return 0


def clear_cache(cfg: Config) -> int:
    """Deletes the cached features that no run uses."""
    from training import feature_files

    log.info("Deleted %.2f GB of cached features in %s", feature_files.clear(cfg) / GB, feature_files.folder(cfg))
    return 0


def prepare(cfg: Config) -> int:
    """Downloads the data set and the ImageNet weights, for a machine that trains offline.

    Raises:
        RunError: if one of them is unavailable, after the other has been tried.
    """
    environment.load_tensorflow()
    import data
    import models

    steps = [(cfg.dataset_name, data.prepare, data.files_to_fetch)]
    if cfg.weights in ("auto", "imagenet"):
        steps.append((f"weights of {cfg.model_name}", models.prepare, models.files_to_fetch))
    messages = []
    for name, fetch, files in steps:
        try:
            fetch(cfg)
            log.info("Ready: %s", name)
        except RunError as error:
            messages.append(str(error))
            log.warning("Not ready: %s", name)
            for url, path in files(cfg):
                log.warning("Download %s by hand and save it as %s", url, path)
    if messages:
        raise RunError("; and ".join(messages))
    return 0


def _fail(code, error, argv):
    if is_debug(argv):
        traceback.print_exc()
    log.error("%s", " ".join(str(error).split()))
    return code


if __name__ == "__main__":
    sys.exit(main())
