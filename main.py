"""Fine-tunes a pretrained network by training only the layers with the richest topology.

    python main.py --model_name resnet50 --train_type act_norm_betti_train --rho 0.1

loads the backbone and the data set (by default digits that ship with
scikit-learn), counts the H1 bars of every layer's activations in forward
passes alone, trains the best tenth of the layers, and writes a folder under
logs/ with the ranking, the metrics of each epoch, and a summary of accuracy,
time and peak memory. README.md has the other flags, and what to expect.
"""

import contextlib
import functools
import logging
import sys
import time
import traceback

from core import environment, signals, strategy
from core.errors import RunError, UsageError
from run import failures, report
from run import folder as run_folder
from run.flags import parse
from selection import SCHEMES, Selection

log = logging.getLogger("adabet")


def main(argv=None):
    """Runs the command line.

    Args:
        argv: list of str. Arguments without the program's name; None takes the
            process's own.

    Returns:
        int. The exit code: 0 done; 1 failed while running; 2 wrong use or bad
        input; 130 or 143 after SIGINT or SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    early_log = run_folder.set_up_logging()
    try:
        with signals.handled():
            cfg = parse(argv)
            if cfg.prepare_only:
                return prepare(cfg)
            return list_layers(cfg) if cfg.list_layers else run(cfg, early_log)
    except SystemExit as stop:  # argparse: --help, or a wrong flag that it has explained
        return stop.code
    except UsageError as error:
        return _fail(2, error, argv)
    except RunError as error:
        return _fail(1, error, argv)
    except KeyboardInterrupt:
        return _fail(130, "interrupted by SIGINT", argv)
    except signals.Terminated:
        return _fail(143, "interrupted by SIGTERM", argv)
    except Exception as error:  # what nobody foresaw is one line too; --debug has the traceback
        return _fail(1, f"{type(error).__name__}: {error}", argv)


def run(cfg, early_log):
    """Selects, fine-tunes and reports.

    Args:
        cfg: Config.
        early_log: logging.Handler that keeps the log until there is a log.txt.

    Returns:
        int. The exit code.
    """
    run_folder.check_place(cfg)
    folder = None
    if cfg.resume and run_folder.exists(cfg):
        folder = run_folder.RunFolder(cfg, early_log)
        if summary := run_folder.finished_summary(folder.path):
            folder.finish()
            log.info("%s is finished: there is nothing to go on with.", folder.path)
            print(report.console_block(summary))
            return 0
    environment.load_tensorflow()
    import data
    import export
    import models
    import train
    from memory import budget
    from memory.measure import measured_peak
    from training import checkpoint

    saved = folder and checkpoint.latest(folder.path)

    # All that can be wrong with the input comes to light before there is a new run folder.
    images = data.load(cfg)
    environment.seed_everything(cfg.seed)  # after the data: preparing a set draws random numbers of its own
    devices = strategy.make(cfg)
    strategy.check_batches(devices, images.batch_size, images.split_sizes)
    with strategy.scope(devices):
        network = models.assemble(cfg, images.num_classes)
    scheme = SCHEMES[cfg.train_type]
    if not saved:
        scheme.check(network, cfg, images.split_sizes["train"])
    with strategy.scope(devices):
        network = models.load_weights(network, cfg)
    if cfg.save_litert and not saved:
        export.check(network, cfg)
    if cfg.memory_budget_mb is not None and not saved:
        budget.check(network, cfg, images.batch_size)

    folder = folder or run_folder.RunFolder(cfg, early_log)
    record = report.config_record(cfg, images, network, folder)
    if cfg.resume:
        report.check_same_surroundings(record, run_folder.recorded(folder.path))
    folder.write_json("config.json", record)
    log.info("Run folder: %s", folder.path)
    _announce(cfg, images, network)

    result, selection = train.Result(), None
    try:
        if saved:
            selection = Selection.from_record(saved.record["selection"])
            checkpoint.fill(result, saved.record["result"])
            restore = functools.partial(scheme.restore, network, images.selection_batches, cfg)
            if result.later:
                result.later[-1] = (result.later[-1][0], restore(result.later[-1][1]))
            else:
                selection = restore(selection)
            log.info("Goes on after epoch %d, step %d", saved.record["epoch"], saved.record["step"])
        else:
            start = time.perf_counter()
            with measured_peak() as peak:
                selection = scheme.select(network, images.selection_batches, cfg)
            result.selection_s, result.selection_peak_bytes = time.perf_counter() - start, peak.bytes
            if cfg.memory_budget_mb is not None:
                selection, *following = budget.fit(network, selection, cfg, images.batch_size)
                result.budget_next_layer, result.budget_next_bytes = following
        folder.write_json("selection.json", report.selection_record(cfg, selection, result.later))
        for name, content in selection.files.items():
            folder.write_json(name, content)
        if cfg.select_only:
            print(report.ranking_table(selection))
            return 0
        _announce_selection(network, selection, result.selection_s)
        if not saved:
            checkpoint.save_selection(folder.path, selection, result)
        train.fine_tune(network, selection, images, cfg, folder, result, saved)
        if cfg.save_model and result.status == "done":
            folder.save_model(network.model)
        if cfg.save_litert and result.status == "done":
            export.write(network, selection.trained_weights, cfg, folder.path / "model.tflite")
        summary = report.summary_record(cfg, images, network, selection, result)
        if cfg.save_txt and result.status == "done":
            folder.write_txt(summary)
        folder.write_json("summary.json", summary)
    except BaseException as error:
        signals.hold()  # one more signal must not cost the summary
        result.status = "interrupted" if isinstance(error, tuple(signals.EXCEPTIONS.values())) else "failed"
        if not cfg.select_only:
            with contextlib.suppress(OSError):  # what ended the run is what has to be said
                folder.write_json("summary.json", report.summary_record(cfg, images, network, selection, result))
        if result.status == "interrupted":
            log.info("To go on: python main.py --resume %s", folder.path)
        told = failures.explained(error, failures.Situation(cfg, folder.path, network, selection, images.batch_size))
        if told is None:
            raise
        raise RunError(told) from error
    if result.status == "diverged":
        raise RunError(result.advice)
    if summary["stayed_at_chance"]:
        log.warning(
            "The training accuracy never left chance (%.2f %% of the training images are of one class): look at the labels, "
            "or try another --learning_rate, more epochs, or pretrained --weights.",
            100 * images.majority_share,
        )
    folder.finish()
    print(report.console_block(summary))
    return 0


def list_layers(cfg):
    """Prints the candidate layers' paths, one a line, in forward order; needs neither data nor weights."""
    environment.load_tensorflow()
    import models

    network = models.assemble(cfg, cfg.num_classes or 2)
    print("\n".join(candidate.path for candidate in network.candidates))
    return 0


def prepare(cfg):
    """Fetches the data set and the ImageNet weights, for a machine that trains offline; says what it can't get.

    Returns:
        int. The exit code.
    """
    environment.load_tensorflow()
    import data
    import models

    steps = [(cfg.dataset_name, data.prepare, data.files_to_fetch)]
    if cfg.weights in ("auto", "imagenet"):
        steps.append((f"ImageNet weights of {cfg.model_name}", models.prepare, models.files_to_fetch))
    failures = []
    for name, fetch, files in steps:
        try:
            fetch(cfg)
            log.info("Ready: %s", name)
        except RunError as error:
            failures.append(str(error))
            log.warning("Not ready: %s", name)
            for url, path in files(cfg):
                log.warning("%s can be fetched by hand and put at %s", url, path)
    if failures:
        raise RunError("; and ".join(failures))
    return 0


def _fail(code, error, argv):
    if "--debug" in argv:
        traceback.print_exc()
    log.error("%s", " ".join(str(error).split()))
    return code


def _announce(cfg, images, network):
    sizes = ", ".join(f"{size} {split}" for split, size in images.split_sizes.items() if size)
    log.info(
        "Network: %s, %d candidate layers, %d classes", cfg.model_name, len(network.candidates), images.num_classes
    )
    log.info("Data: %s, images: %s; protocol %s", images.version, sizes, cfg.protocol)
    if network.bn_stats:
        log.info(
            "Batch normalisation runs on %s statistics",
            {"stored": "its stored", "batch": "each batch's"}[network.bn_stats],
        )
    log.info("Device: %s", environment.device())


def _announce_selection(network, selection, selection_s):
    facts = report.trained_facts(network, selection)
    log.info(
        "Trains %d of %d layers%s, %d of %d weights, from %s on; chosen in %.1f s",
        facts["num_trained_layers"], facts["num_layers"],
        " (the head beyond the budget)" if selection.head_added else "", facts["num_trained_weights"],
        facts["num_weights"], facts["earliest_trained_layer"], selection_s,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
