"""How a model is compiled here: by the loop, by memory_utils.py, and by ElasticTrainer's look one step ahead."""

import keras

from core import strategy


def make_optimizer(cfg, total_steps):
    """Returns the optimizer: cosine decay to 0, decoupled weight decay, clipped gradients."""
    schedule = keras.optimizers.schedules.CosineDecay(cfg.learning_rate, decay_steps=total_steps)
    common = {
        "learning_rate": schedule,
        "weight_decay": cfg.weight_decay or None,
        "global_clipnorm": cfg.global_clipnorm or None,
    }
    optimizer = OPTIMIZERS[cfg.optimizer](common)
    return optimizer if cfg.strategy == "none" else strategy.clip_the_sum(optimizer)


OPTIMIZERS = {
    "sgd": lambda common: keras.optimizers.SGD(momentum=0.9, **common),
    "adam": lambda common: keras.optimizers.Adam(**common),
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
