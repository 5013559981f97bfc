"""How a model is compiled here: by the loop, by memory_utils.py, and by ElasticTrainer's look one step ahead."""

import keras

from core import strategy


def make_optimizer(cfg, total_steps):
    """Returns the optimizer: `--lr_schedule`, decoupled weight decay, clipped gradients."""
    common = {
        "learning_rate": SCHEDULES[cfg.lr_schedule](cfg.learning_rate, total_steps),
        "weight_decay": cfg.weight_decay or None,
        "global_clipnorm": cfg.global_clipnorm or None,
    }
    optimizer = OPTIMIZERS[cfg.optimizer](cfg, common)
    return optimizer if cfg.strategy == "none" else strategy.clip_the_sum(optimizer)


OPTIMIZERS = {
    "sgd": lambda cfg, common: keras.optimizers.SGD(momentum=cfg.momentum, **common),
    "adam": lambda cfg, common: keras.optimizers.Adam(**common),
}

SCHEDULES = {
    "cosine": lambda rate, total_steps: keras.optimizers.schedules.CosineDecay(rate, decay_steps=total_steps),
    "constant": lambda rate, total_steps: rate,
}


def compile_model(model, optimizer):
    """Compiles a model as every training here does; what trains has to be frozen or not before."""
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # XLA made a CPU step several times slower, and its first step minutes long.
        jit_compile=False,
    )
