"""The settings of a run, in one frozen record."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Every flag, with its default resolved.

    None means that the flag was not given and has no default, or that the chosen
    scheme does not read it. `rho` is also None if `memory_budget_mb` takes its place.
    """

    # Network
    model_name: str = "resnet50"  # a name of models.MODELS, or the path of a .keras file
    model_alpha: float | None = None  # width of a MobileNet; None is 1
    custom_objects: str | None = None  # of a .keras file: MODULE:NAME,...
    keep_head: bool = False  # of a .keras file
    preprocessing: str | None = None  # of a .keras file: none, unit, symmetric, caffe, torch
    weights: str = "auto"  # auto, imagenet, none, or a path
    input_size: int = 32  # pixels; images are square
    num_classes: int | None = None  # compared with the data's class count
    bn_stats: str = "auto"  # auto, stored, batch
    dropout: float = 0.2
    head_init: str = "small"  # small, glorot
    # Data
    dataset_name: str = "digits"
    data_dir: str | None = None
    image_dir: str | None = None
    skip_bad_images: bool = False
    protocol: str = "validation"  # validation, paper
    augment: bool = True
    limit_train: int | None = None  # images
    limit_test: int | None = None  # images
    # Selection
    train_type: str = "act_norm_betti_train"
    rho: float | None = 0.1
    interval: int | None = None  # epochs
    timing: str | None = None  # measured, flops
    num_betti_batches: int | None = 4  # point clouds
    betti_points: int | None = None  # images per point cloud; None uses the batch size
    layers: str | None = None  # a regular expression, or @FILE
    exclude_layers: str | None = None  # a regular expression
    memory_budget_mb: float | None = None  # 10^6 bytes
    # Training
    batch_size: int = 32
    optimizer: str = "sgd"  # sgd, adam
    learning_rate: float = 1e-2
    lr_schedule: str = "cosine"  # cosine, constant
    momentum: float = 0.9  # of sgd
    weight_decay: float = 5e-3
    global_clipnorm: float = 1.0  # 0 is off
    num_epochs: int = 10
    warmup_epochs: int = 0  # first epochs, which train the head alone
    early_stopping: int | None = None  # epochs without a better one
    strategy: str = "none"  # none, mirrored
    seed: int = 0
    checkpoint_minutes: float = 10.0  # 0 is after every step
    # Cached features of the frozen layers
    cache_features: str = "auto"  # auto, off, memory, disk
    cached_views: int | None = None  # augmented views of each image
    cache_dtype: str = "float32"  # float32, float16
    cache_dir: str | None = None  # None is a folder below XDG_CACHE_HOME or ~/.cache
    cache_limit_gb: float = 20.0  # 10^9 bytes, of all features in cache_dir
    # Output
    log_dir: str = "logs"
    run_name: str | None = None
    save_model: bool = False
    save_txt: bool = False
    save_litert: bool = False
    litert_momentum: float | None = None  # 0 leaves out the momentum's slots; None is `momentum`
    litert_batch: int | None = None  # images of a training step; None is the batch size
    litert_frozen: str = "float32"  # float32, float16, int8
    resume: bool = False
    select_only: bool = False
    prepare_only: bool = False
    clear_cache: bool = False
    evaluate: str | None = None  # a run folder, or the path of a .keras file
    list_layers: bool = False
    list_models: bool = False
    debug: bool = False
