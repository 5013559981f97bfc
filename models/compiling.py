"""How models are compiled, for training, for memory figures, and for the importance of ElasticTrainer."""

import keras

from core import strategy
from core.config import Config


def make_optimizer(cfg: Config, total_steps: int) -> keras.Optimizer:
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


def compile_model(model: keras.Model, optimizer: keras.Optimizer) -> None:
    """Compiles a model with the loss and metric of this program. Freeze its weights before."""
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # XLA makes a step on a CPU several times slower.
        jit_compile=False,
    )
