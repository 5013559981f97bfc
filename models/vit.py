"""ViT-B/16 on keras-hub, at any input size that is a multiple of the patch."""

import os

import keras
import keras_hub
import numpy as np

# Those of the preset vit_base_patch16_224_imagenet; `load_preset` compares them.
HYPERPARAMETERS = {
    "patch_size": 16,
    "num_layers": 12,
    "num_heads": 12,
    "hidden_dim": 768,
    "mlp_dim": 3072,
    "dropout_rate": 0.0,
    "attention_dropout": 0.0,
    "layer_norm_epsilon": 1e-6,
    "use_mha_bias": True,
    "use_mlp_bias": True,
    "use_class_token": True,
    "use_patch_bias": True,
}


def preset_folder(preset: str) -> str:
    """Returns the folder in which kagglehub keeps `preset`, present or not."""
    handle = keras_hub.models.ViTBackbone.presets[preset]["kaggle_handle"]
    cache = os.environ.get("KAGGLEHUB_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "kagglehub")
    return os.path.join(cache, "models", *handle.removeprefix("kaggle://").split("/"))


def preset_page(preset: str) -> str:
    """Returns the address of the page that offers `preset` for download."""
    handle = keras_hub.models.ViTBackbone.presets[preset]["kaggle_handle"]
    owner, model, framework, variation, version = handle.removeprefix("kaggle://").split("/")
    return f"https://www.kaggle.com/models/{owner}/{model}/{framework}/{variation}/{version}"


def load_preset(preset: str):
    """Returns the pretrained ViTBackbone of a preset's name or folder.

    Raises:
        ValueError: if its hyper-parameters are not ours, so its weights would
            fit and still compute something else.
    """
    backbone = keras_hub.models.ViTBackbone.from_preset(preset)
    theirs = backbone.get_config()
    differing = [
        f"{name} {theirs[name]} instead of {value}"
        for name, value in HYPERPARAMETERS.items()
        if np.any(np.asarray(theirs[name]) != value)  # patch_size is a pair there
    ]
    if differing:
        raise ValueError(f"preset {preset} has {', '.join(differing)}")
    return backbone


def resize_position_embedding(embedding: np.ndarray, num_positions: int) -> np.ndarray | None:
    """Interpolates a position embedding to another number of patches.

    The class token's row, the first, is kept; the others are a square grid,
    resized bilinearly on aligned pixel centres (half-pixel convention), edges
    extended.

    Args:
        embedding: float array of shape (1 + g * g, hidden).
        num_positions: int. 1 + G * G.

    Returns:
        float32 array of shape (1 + G * G, hidden), or None if either count
        is not that of a class token and a square grid.
    """
    old, new = grid_side(len(embedding)), grid_side(num_positions)
    if old is None or new is None:
        return None
    embedding = np.asarray(embedding, "float32")
    grid = embedding[1:].reshape(old, old, -1)
    resized = keras.ops.image.resize(grid, (new, new), interpolation="bilinear")
    return np.concatenate([embedding[:1], np.reshape(resized, (new * new, -1))])


def grid_side(num_positions: int) -> int | None:
    """Returns g if `num_positions` is 1 + g * g, or None."""
    side = round((num_positions - 1) ** 0.5)
    return side if side > 0 and side * side == num_positions - 1 else None
