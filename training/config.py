"""Every option of a training run, with the reason for its default; read from YAML and the command line."""

import dataclasses
import inspect
import textwrap
import types
import typing
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from .options import DatasetOptions, nearest, read_list, read_text, read_yaml
from .places import checkpoint_folder, free_cores, recipes

PATH = {"path": True}  # of an option that may hold a path of this machine: no push publishes that

# What a resumed run may do otherwise: the same is learned, and numbers of steps and batches are compared apart.
MAY_DIFFER = {
    *("overwrite", "resume", "resume_despite", "compare_bytes", "save_every_steps", "keep_checkpoints", "stop_timeout"),
    *("log_every_steps", "trackers", "project_name", "fresh_scenes", "check_images", "on_unreadable", "cache_images"),
    *("num_workers", "gradient_checkpointing", "compile", "epochs", "max_steps", "batch_size", "eval_batch_size"),
    *("epoch_steps", "shuffle_buffer"),
    *("gradient_accumulation_steps", "seed", "mixed_precision", "early_stopping_patience", "threshold_objective"),
    *("threshold_target", "evaluate_test", "report", "push_to_hub", "hub_private"),
}


def path(default: str | None = None):
    return field(default=default, metadata=PATH)


@dataclass(kw_only=True)
class TrainingConfig(DatasetOptions):
    # --- the run
    output_dir: str = path("runs/hsvlt")  # config.yaml, log.jsonl, best/, checkpoint-STEP/ and results.json go here
    overwrite: bool = (
        False  # replace what output_dir holds (it goes when this run has saved); off, because it may be days of work
    )
    resume: bool = False  # continue from the newest good checkpoint in output_dir, exactly
    resume_despite: list[Literal["label_names", "dataset", "total_steps", "batches", "options"]] = field(
        default_factory=list
    )  # what may differ from the run that is resumed; nothing, because it would not be the same run
    compare_bytes: bool = False  # hold a resumed run to every byte of its images; false: to their sizes and times
    seed: int = 0  # of weights, order and augmentation; every batch has its own generator state derived from it
    save_every_steps: int | None = None  # also save inside an epoch; null: at the end of each epoch
    keep_checkpoints: int = 2  # newest checkpoint-STEP folders that stay: where one is damaged, the other is used
    stop_timeout: float = 60.0  # seconds to finish the step and save in after SIGINT or SIGTERM, then out in any case
    log_every_steps: int = 10  # often enough for a curve, rare enough that the device need not wait
    trackers: list[str] = field(default_factory=list)  # beside log.jsonl: tensorboard, wandb, trackio, mlflow, ...
    project_name: str = "hsvlt"  # what those trackers call the project

    # --- data, see training/data/
    # how the dataset is read stands in training/options.py, where every command has it from
    dataset: str = path("scenes")  # the built-in data needs no download
    fresh_scenes: bool = True  # new training scenes every epoch: drawing is free, memorising 6,000 scenes is easy
    check_images: bool = True  # decode every image before the first step: one bad file ends an epoch otherwise
    on_unreadable: Literal["error", "skip"] = "error"  # skip: train without the images that cannot be decoded
    partial_labels: dict | None = None  # hide labels of train for experiments: {known_fraction: 0.1, seed: 0} or
    # {single_positive: true, seed: 0}, see training/data/sparse_labels.py; null: train on all labels there are
    cache_images: bool = False  # keep resized images in memory: faster where decoding is slower than the model
    num_workers: int | None = None  # decoding processes; null: by the cores of this machine; 0: the training process
    shuffle_buffer: int = 1000  # with streaming: images that are held and shuffled, twice so many in memory as stored
    epoch_steps: int | None = None  # with streaming: optimizer steps of an epoch; null: what the rows of parquet make

    # --- images
    image_size: int = 448  # side in px, as published; a multiple of the backbone's stride (32)
    image_mean: list[float] | None = field(default_factory=lambda: [0.485, 0.456, 0.406])  # ImageNet's, which
    image_std: list[float] | None = field(default_factory=lambda: [0.229, 0.224, 0.225])  # pretrained backbones expect;
    # both null: pixels stay in [0, 1], as in the official HSVLT run
    resize_mode: Literal["squash", "pad"] = "squash"  # as published: no label's object is lost, none is made smaller
    resample: Literal["bilinear", "bicubic"] = "bicubic"  # what pretrained backbones saw; the official run: bilinear
    augmentation: dict | None = field(
        default_factory=dict
    )  # options of training.data.augment.build_augmentation; null: none
    crop_margin: float = 0.125  # images reach the random crop this much larger, so that it need not enlarge them

    # --- model
    model_type: str = "hsvlt"  # hsvlt, mltr or hp_dval
    preset: str | None = "small"  # the published size with a published number
    model: dict = field(default_factory=dict)  # any field of the model's configuration
    backbone: str | None = path()  # pretrained backbone: efficientnet_lite0 (lite1, lite2), or a folder or Hub id in
    # transformers' format, or timm/NAME where timm is installed; null: random weights
    backbone_revision: str | None = None  # required for a Hub id: a commit (config.yaml gets the commit of a branch)
    backbone_statistics: bool = False  # image_mean and image_std are those of the processor of backbone or init_from
    freeze_backbone: bool = False  # train only what stands on the backbone: right for few images and no GPU
    cache_features: bool = False  # with freeze_backbone: compute the backbone's maps once, and keep them on disk
    feature_cache: str | None = path()  # the folder for that; null: hsvlt/features in the user's cache
    feature_cache_gib: float = 20.0  # what that folder may hold, GiB; the maps not used for longest go first
    unfreeze_epochs: int = 0  # with freeze_backbone: of the epochs, the last ones train the backbone as well
    label_encoder: str | None = path()  # text encoder of the label names: all-MiniLM-L6-v2, folder or Hub id; null:
    # random by seed
    label_encoder_revision: str | None = None
    label_pooling: Literal["mean", "official"] = "mean"  # "official" is the released embedding script's, for parity
    label_template: str | None = None  # text with {} for the name; null: "a photo of a {}", hp_dval's with a full stop
    label_text: dict = field(default_factory=dict)  # what to encode in place of a name: {tvmonitor: tv monitor}
    label_context: dict | None = field(default=None, metadata=PATH)  # to learn in front of the names, see
    # training.models.build.add_label_context
    text_classifier: bool | None = None  # start model.residual_attention or label_stream tied from the classifier of
    # the backbone, whose classes are matched to the labels by text; null: where the backbone has one
    initial_bias: float | None = None  # of logits that start fresh: -4 spares the weights to learn that most labels are
    # absent; null: as the model starts
    init_from: str | None = path()  # start from all weights of this checkpoint of ours: folder or Hub id
    init_from_revision: str | None = None
    loss_type: str = "bce"  # as published; others: modeling_hsvlt/losses_multilabel.py
    loss_kwargs: dict | None = None
    gradient_checkpointing: bool = False  # recompute activations backwards: less memory, about a third more time
    compile: bool = False  # torch.compile: faster after a minute or more of compiling

    # --- optimisation, see training/loop/optim.py
    epochs: int = 20  # fine-tuning converges within these (the official COCO curve is flat from epoch 10 on)
    max_steps: int | None = None  # stop after this many optimizer steps, for a quick try
    batch_size: int = 16  # images a process and step
    eval_batch_size: int | None = None  # null: batch_size
    gradient_accumulation_steps: int = 1  # effective batch = processes * batch_size * this
    optimizer: Literal["adamw", "muon"] = "adamw"  # as published. muon: orthogonalised momentum for matrices and full
    # convolutions, at the same learning rate and decay; from random weights it needs far fewer epochs
    learning_rate: float = 1e-4  # of what starts from random weights
    backbone_lr_multiplier: float = 1.0  # 0.1 spares a pretrained backbone: that is 1e-5, the published rate
    weight_decay: float = 1e-4  # as published
    parts: dict = field(default_factory=dict)  # learning_rate and weight_decay of a module of its own, by name:
    # {residual_attention: {learning_rate: 0.01, weight_decay: 8}}
    decay_all: bool = False  # true decays norms, biases and scales as well, as the official run did
    # cosine needs no luck with patience; wsd, for short runs from random weights, stays at the full rate for 0.6 of the
    # steps and falls in a line; plateau is as published
    scheduler: Literal["cosine", "wsd", "plateau"] = "cosine"
    warmup_epochs: float = 2.0  # as published; cut to half of a short run
    warmup_steps: int | None = None  # in place of warmup_epochs
    plateau_factor: float = 0.1  # as published
    plateau_patience: int = 1  # as published
    max_grad_norm: float | None = 1.0  # one odd batch must not undo an epoch; null: no clipping
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is NaN or infinite: skip leaves that step
    # out and goes on, up to 10 times in a row; neither ever saves it
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = None  # null: what `accelerate launch` was told;
    # auto: bf16 where the machine has instructions for it, else fp16 on a GPU and none on a CPU
    ema_decay: float | None = 0.9997  # the field's usual value; its ramp makes it harmless in short runs; null: off

    # --- validation and the end
    early_stopping_patience: int | None = None  # epochs without a better validation mAP before stopping
    threshold_objective: Literal["f1", "precision", "recall", "cost"] = "f1"  # for each label, on validation
    threshold_target: float | None = None  # the precision or recall to hold, or what a false positive costs
    evaluate_test: bool = False  # score the test split once, at the very end; it never chooses anything
    report: bool = False  # write report/, a page of plots, thresholds and mistakes of best/ on validation
    push_to_hub: str | None = None  # repository id, "user/name"
    hub_private: bool = True  # publishing is a decision of its own

    def __post_init__(self):
        for key, value in _typed(vars(self)).items():
            setattr(self, key, value)
        super().__post_init__()
        counts = ("batch_size", "gradient_accumulation_steps", "epochs", "image_size", "log_every_steps")
        for key in (*counts, "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, but must be at least 1.")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other: give one of them.")
        if self.init_from:
            self.init_from = checkpoint_folder(self.init_from)
        if self.init_from and self.backbone:
            raise ValueError("init_from already brings a backbone: leave backbone out, or init_from.")
        if self.label_context is not None and (self.label_encoder is None or self.label_pooling != "mean"):
            raise ValueError("label_context needs the label_encoder that reads it, with label_pooling mean.")
        if self.text_classifier and not self.can_transfer_classifier:
            raise ValueError("text_classifier needs a backbone with a classifier, and a label_encoder, reading mean.")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std belong together: give both, or null for both.")
        if (self.threshold_objective == "f1") != (self.threshold_target is None):
            raise ValueError("threshold_target belongs to the objectives precision, recall and cost, and they need it.")
        if self.augmentation is not None:
            from .data.augment import check_augmentation_names  # brings torch, which no --help should wait for

            check_augmentation_names(list(self.augmentation))
        self._check_frozen()
        self._check_streaming()

    @property
    def can_transfer_classifier(self) -> bool:
        """Whether there are a backbone and texts for `text_classifier`."""
        return bool(self.backbone and self.label_encoder and self.label_pooling == "mean")

    def _check_frozen(self) -> None:
        if self.backbone_statistics and not (self.backbone or self.init_from):
            raise ValueError("backbone_statistics are those of pretrained weights: give backbone or init_from.")
        for key in ("cache_features", "unfreeze_epochs"):
            if getattr(self, key) and not self.freeze_backbone:
                raise ValueError(f"{key} belongs to a frozen backbone: set freeze_backbone to true, or leave it out.")
        if self.freeze_backbone and not (self.backbone or self.init_from):
            raise ValueError("freeze_backbone keeps pretrained weights as they are: give backbone or init_from.")
        if not 0 <= self.unfreeze_epochs < self.epochs:
            raise ValueError(f"unfreeze_epochs is {self.unfreeze_epochs}, but must be less than epochs, {self.epochs}.")
        if not self.cache_features:
            return
        if self.cache_images and not self.unfreeze_epochs:
            raise ValueError("cache_features reads no images while it trains: leave cache_images out.")
        if not self.feature_cache_gib > 0:
            raise ValueError(f"feature_cache_gib is {self.feature_cache_gib:g}, but must be above 0.")
        if self.augmentation is not None:
            from .data.augment import changes_images

            changing = [name for name in changes_images(self.augmentation) if name != "horizontal_flip"]
            if changing:
                raise ValueError(
                    "cache_features keeps the maps of whole images and their mirror images, so augmentation cannot "
                    f"have {changing[0]}: set it to {'null' if changing[0] == 'crop_scale' else '0'}, or leave "
                    "cache_features out."
                )

    def _check_streaming(self) -> None:
        if not self.streaming:
            if self.epoch_steps is not None:
                raise ValueError("epoch_steps belongs to a stream: set streaming to true, or leave it out.")
            return
        for key in ("cache_images", "cache_features", "partial_labels", "compare_bytes"):
            if getattr(self, key):
                raise ValueError(f"{key} needs a dataset that is read whole: switch it off, or leave out streaming.")
        for key in ("shuffle_buffer", "epoch_steps"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, but must be at least 1.")

    @property
    def workers(self) -> int:
        """`num_workers`, fitted to this machine where it is None."""
        return free_cores() if self.num_workers is None else self.num_workers

    def shaping(self) -> dict:
        """The options that decide what is learned, which a resumed run has to share; where the data come from, its
        fingerprint tells."""
        inherited = {entry.name for entry in dataclasses.fields(DatasetOptions)}
        paths = {entry.name for entry in dataclasses.fields(self) if entry.metadata.get("path")}
        free = inherited | paths | {f"{name}_revision" for name in paths} | MAY_DIFFER
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def parse_config(argv: list[str]) -> TrainingConfig:
    """Read `[RECIPE] [DATASET] [--key value ...]`; what comes later wins.

    RECIPE is a YAML file, the short name of one of ours, or the folder of a run. A first word that is none of these is
    the DATASET, for the recipe `photos`; so is a short name that is a folder's too, with no DATASET after it.

    Values are spelled as `training.options` says. A key alone means true. A dot reaches into a dictionary:
    `--model.num_attention_heads 4`, `--augmentation.mixup 0.2`.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type, a value without a key.
        FileNotFoundError: no such recipe or dataset.
    """
    values: dict = {}
    arguments = list(argv)
    words = list(takewhile(lambda word: not word.startswith("--"), arguments))
    if words:
        arguments = arguments[len(words) :]
        path, words = _find_recipe(words)
        values = _read_recipe(path)
    if words:
        values["dataset"] = words.pop(0)
    if words:
        raise ValueError(f"{words[0]!r} follows no option: write --key value.")
    hints = typing.get_type_hints(TrainingConfig)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"{argument!r} follows no option: write --key value.")
        key, equals, text = argument[2:].partition("=")
        words = [text] if equals else []
        while arguments and not arguments[0].startswith("--"):
            words.append(arguments.pop(0))
        words = words or ["true"]
        key, _, inner = key.replace("-", "_").partition(".")
        _check_keys([key], "the command line")
        kind = dict if inner else _kind(hints[key])[0]
        if kind is list:
            values[key] = read_list(words)
            continue
        if len(words) > 1:
            raise ValueError(f"{words[1]!r} follows no option: write --key value.")
        value = read_text(words[0]) if kind in (str, Literal) else read_yaml(words[0])
        if inner:
            for name in reversed(inner.split(".")):
                value = {name: value}
            value = OmegaConf.to_container(OmegaConf.merge(values.get(key) or {}, value))
        values[key] = value
    return TrainingConfig(**values)


def recipe(name: str | Path, dataset: str | Path | None = None, **options) -> TrainingConfig:
    """The options of a run, from Python: `recipe("photos", "my photos", epochs=5)`.

    Args:
        name: A YAML file, the short name of one of ours, or the folder of a run.
        dataset: Folder or Hub id; None: the recipe's own.
        options: Others than the recipe's.

    Raises:
        ValueError, OSError: in one sentence, what was wrong and what to do.
    """
    words = [str(name)] if dataset is None else [str(name), str(dataset)]
    path, words = _find_recipe(words)
    _check_keys(options, "the arguments")
    return TrainingConfig(**_read_recipe(path) | ({"dataset": words[0]} if words else {}) | options)


def _read_recipe(path: Path) -> dict:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines.")
    if not values:
        raise ValueError(f"{path} is empty: give the file of a run or of a recipe, not its defaults by accident.")
    _check_keys(values, str(path))
    return values


def _find_recipe(words: list[str]) -> tuple[Path, list[str]]:
    """The YAML file that the words before the first option mean, and the words that it leaves."""
    first, known = words[0], recipes()
    if (Path(first) / "config.yaml").is_file():
        return Path(first) / "config.yaml", words[1:]
    if first.endswith((".yaml", ".yml")):
        if not Path(first).is_file():
            raise FileNotFoundError(f"{first} does not exist: give a YAML file of training options, or a short name.")
        return Path(first), words[1:]
    if first in known and not (len(words) == 1 and Path(first).is_dir()):
        return known[first], words[1:]
    if len(words) > 1 or not (Path(first).exists() or first == "scenes" or first.count("/") == 1):
        near = nearest(first, known)
        hint = f"did you mean {near}?" if near else f"choose {', '.join(known)}, or give a YAML file."
        raise FileNotFoundError(f"{first} is no recipe" + ("" if len(words) > 1 else " and no folder") + f": {hint}")
    return known["photos"], words


def describe_options() -> str:
    """Every option with its default and the reason, as its declaration says it."""
    kinds = [kind for kind in reversed(TrainingConfig.__mro__) if dataclasses.is_dataclass(kind)]
    sources = (inspect.getsource(kind).partition(":\n")[2].partition("\n    def ")[0] for kind in kinds)
    return "\n\n".join(textwrap.dedent(source).rstrip() for source in sources)


def _check_keys(keys, where: str) -> None:
    known = [entry.name for entry in dataclasses.fields(TrainingConfig)]
    for key in keys:
        if key not in known:
            near = nearest(str(key), known)
            hint = f"did you mean {near!r}?" if near else "see training/config.py for all of them."
            raise ValueError(f"Unknown option {key!r} in {where}: {hint}")


def _kind(hint) -> tuple[typing.Any, tuple]:
    """What a value is where it is not None, a type or Literal; and what it, or an item of it, is chosen from."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    kind = typing.get_origin(hint) or hint
    item = typing.get_args(hint)[0] if kind is list else hint
    return kind, typing.get_args(item) if typing.get_origin(item) is Literal else ()


def _typed(values: dict) -> dict:
    """The values as the fields' types; YAML reads 1 for a float, and a bare `no` as false.

    Raises:
        ValueError: a value of the wrong type.
    """
    typed = OmegaConf.structured(TrainingConfig)
    for key, hint in typing.get_type_hints(TrainingConfig).items():
        value, (kind, allowed) = values[key], _kind(hint)
        value = list(value) if isinstance(value, tuple) else "no" if value is False and "no" in allowed else value
        try:
            # OmegaConf would make True the text "True", and 2 the switch True.
            for item in value if kind is list and isinstance(value, list) else [value]:
                if kind is not dict and item is not None and isinstance(item, bool) != (kind is bool):
                    raise ValidationError()
            OmegaConf.update(typed, key, value, merge=False)
        except OmegaConfBaseException as error:
            name = hint if kind is list else kind.__name__
            if not allowed:
                raise ValueError(f"{key} is {value!r}, but must be a value of type {name}.") from error
            raise ValueError(f"{key} is {value!r}: choose {' or '.join(map(repr, allowed))}.") from error
    return OmegaConf.to_container(typed)
