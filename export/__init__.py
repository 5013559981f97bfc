"""Export of a fine-tuned network as a LiteRT model that goes on training on a device.

`check` raises an error before training if the network cannot be exported, `write` writes the file after
it. TensorFlow is imported when they are called.
"""

from collections.abc import Collection
from pathlib import Path

from core.config import Config
from core.errors import RunError, UsageError
from core.files import whole_file
from core.log import log
from core.units import MB
from models import Network
from selection import SCHEMES

FROZEN = ("float32", "float16", "int8")  # values of --litert_frozen


def check(network: Network, cfg: Config) -> None:
    """Checks that the run's network can be exported, whichever of its weights will train.

    Args:
        network: models.Network, with its weights loaded.
        cfg: Config. Reads `train_type`, `strategy` and the flags that start with `litert`.

    Raises:
        UsageError: if the scheme selects again while it trains, if normalization runs on batch
            statistics, if the run uses several devices, or if an operation has no counterpart
            among LiteRT's built-in operations.
    """
    if "interval" in SCHEMES[cfg.train_type].reads:
        raise UsageError(
            "--save_litert needs a scheme that trains the same weights from the first step to the last. "
            f"Received: --train_type {cfg.train_type}; choose another scheme, or leave out --save_litert."
        )
    if cfg.strategy != "none":
        raise UsageError(
            f"--save_litert needs a network on one device. Received: --strategy {cfg.strategy}; leave out one of them."
        )
    if network.bn_stats == "batch":
        raise UsageError(
            "--save_litert needs batch normalization on stored statistics. Received: batch statistics; "
            "use pretrained --weights, or --bn_stats stored."
        )
    from export import convert, gradients, training_module

    everything = [weight.path for weight in network.trainable_weights]
    try:
        _, signatures = training_module.make(network, everything, cfg)
        unknown = convert.unknown_operations(signatures["train"].get_concrete_function().graph, network.model)
    except gradients.Unsupported as error:
        unknown = [str(error)]
    if unknown:
        raise UsageError(
            "--save_litert needs a network of operations that are known to convert to LiteRT. "
            f"Received: {cfg.model_name} with {'; '.join(unknown[:3])}; choose another network, or leave "
            "out --save_litert."
        )


def write(network: Network, trained_weights: Collection[str], cfg: Config, path: Path) -> None:
    """Writes the network as a .tflite file with the signatures of `training_module.make`.

    Args:
        network: models.Network, trained.
        trained_weights: collection of str. The paths of the weights that train on the device.
        cfg: Config. Reads `batch_size`, `weight_decay`, `global_clipnorm` and the flags that start with `litert`.
        path: pathlib.Path. Replaced once the file is complete.

    Raises:
        RunError: if the converter fails.
        OSError: if the file cannot be written.
    """
    from export import convert, gradients, storage, training_module

    frozen = storage.quantized_kernels(network, trained_weights) if cfg.litert_frozen == "int8" else {}
    try:
        module, signatures = training_module.make(network, trained_weights, cfg, frozen)
        content = convert.to_litert(module, signatures)
    except gradients.Unsupported as error:
        raise RunError(f"the network cannot be exported: {error}. Leave out --save_litert.") from error
    if cfg.litert_frozen != "float32":
        content = storage.packed(content, cfg.litert_frozen)
    with whole_file(path) as file:
        file.write(content)
    log.info("LiteRT model: %s (%.1f MB), frozen weights in %s", path, len(content) / MB, cfg.litert_frozen)
