"""What the values of a configuration may be: the limits of every option, and those that tie options together."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from distill.config import Config, EngineConfig, RelabelConfig
from distill.config_cluster import ClusterConfig
from distill.errors import ConfigError

READ_WITH = {
    "squeeze.momentum": ("squeeze.optimizer", "sgd"),
    "squeeze.step_epochs": ("squeeze.schedule", "step"),
    "squeeze.step_factor": ("squeeze.schedule", "step"),
    "squeeze.crop_scale": ("squeeze.crop", "resized"),
    "squeeze.padding": ("squeeze.crop", "padded"),
    "recover.crop_scale": ("recover.crop", "true"),
    "recover.milestone": ("recover.curriculum", "linear", "cosine", "step"),
    "relabel.crop_scale": ("relabel.crop", "resized"),
    "relabel.padding": ("relabel.crop", "padded"),
    "relabel.mix_alpha": ("relabel.mix", "cutmix", "mixup"),
    "evaluate.temperature": ("evaluate.labels", "soft"),
    "evaluate.momentum": ("evaluate.optimizer", "sgd"),
    "evaluate.step_epochs": ("evaluate.schedule", "step"),
    "evaluate.step_factor": ("evaluate.schedule", "step"),
}
"""Options that count with some values of another one: its key, and these values. Presets may set them all the same, so
that the other one can be changed alone."""


def check_given(configs: Sequence[Config], given: Collection[str]) -> None:
    """Raises ConfigError when an option of the command line, of these keys, counts in none of its runs."""
    for key, (switch, *values) in READ_WITH.items():
        value, now = operator.attrgetter(key), [str(operator.attrgetter(switch)(config)).lower() for config in configs]
        if key in given and value(configs[0]) != value(Config()) and not set(now) & set(values):
            raise ConfigError(
                f"{key}={value(configs[0])} belongs to {switch}={' or '.join(values)}, and {switch} is {now[0]}."
            )


def check(config: Any, prefix: str = "") -> None:
    """Check every value against the limits of its field.

    Raises:
        ConfigError: naming the full key, the value and what is allowed.
    """
    for f in fields(config):
        value, key = getattr(config, f.name), prefix + f.name
        if is_dataclass(value):
            check(value, key + ".")
        elif value is not None and "help" in f.metadata:
            _check_value(key, value, dict(f.metadata))
    if isinstance(config, Config):
        _check_together(config)


def _check_value(key: str, value: Any, limits: dict[str, Any]) -> None:
    if limits["length"] is not None and len(value) != limits["length"]:
        raise ConfigError(f"{key}={value} has {len(value)} elements and needs {limits['length']}.")
    if limits["choices"] and value not in limits["choices"]:
        raise ConfigError(f"{key}={value} is not one of: {', '.join(limits['choices'])}.")
    for element in value if isinstance(value, list) else [value]:
        if isinstance(element, bool) or not isinstance(element, int | float):
            continue
        if not element == element or element in (float("inf"), float("-inf")):
            raise ConfigError(f"{key}={value} must be finite.")
        if limits["low"] is not None and element < limits["low"]:
            raise ConfigError(f"{key}={value} must be at least {limits['low']:g}.")
        if limits["high"] is not None and element > limits["high"]:
            raise ConfigError(f"{key}={value} must be at most {limits['high']:g}.")
        if limits["below"] is not None and element >= limits["below"]:
            raise ConfigError(f"{key}={value} must be less than {limits['below']:g}.")
        if limits["above"] is not None and element <= limits["above"]:
            raise ConfigError(f"{key}={value} must be greater than {limits['above']:g}.")


def _check_together(config: Config) -> None:
    """Limits that tie two options together."""
    c = config
    if not Path(c.name).parts or Path(c.name).is_absolute() or ".." in Path(c.name).parts:
        raise ConfigError(f"name={c.name!r} must name a folder inside run_root.")
    for stage in ("squeeze", "recover", "relabel"):
        scale = getattr(c, stage).crop_scale
        if scale[0] > scale[1]:
            raise ConfigError(f"{stage}.crop_scale={scale} must rise: the smallest area comes first.")
    if c.recover.ipc % c.recover.images_per_class:
        raise ConfigError(
            f"recover.images_per_class={c.recover.images_per_class} must divide recover.ipc={c.recover.ipc}."
        )
    if c.teacher.network == "convnet":
        raise ConfigError("teacher.network=convnet has no batch norm, whose statistics recovery matches; use a ResNet.")
    for stage, epochs in (("squeeze", c.squeeze.epochs), ("evaluate", c.relabel.epochs)):
        own = getattr(c, stage)
        if own.schedule == "step" and not own.step_epochs:
            raise ConfigError(f"{stage}.schedule=step needs {stage}.step_epochs.")
        if epochs and own.warmup_epochs > epochs:
            raise ConfigError(f"{stage}.warmup_epochs={own.warmup_epochs:g} must not exceed the {epochs} epochs.")
    if len(set(c.recover.snapshots)) < len(c.recover.snapshots):
        raise ConfigError(f"recover.snapshots={c.recover.snapshots} must hold each iteration once.")
    if any(snapshot >= c.recover.iterations for snapshot in c.recover.snapshots):
        raise ConfigError(
            f"recover.snapshots={c.recover.snapshots} must lie below recover.iterations={c.recover.iterations}; "
            f"the last iterate is always kept."
        )
    for name in ("images_mean", "images_std", "images_set"):
        if getattr(c.recover, name) is not None and not c.recover.images:
            raise ConfigError(f"recover.{name} belongs to recover.images, which is not set.")
    if (c.recover.images_mean is None) != (c.recover.images_std is None):
        raise ConfigError("recover.images_mean and recover.images_std go together; set both.")
    if c.recover.curriculum != "none" and not c.recover.crop:
        raise ConfigError(f"recover.curriculum={c.recover.curriculum} needs recover.crop=true.")
    _check_recover(c)
    _check_arms(c)
    _check_controls(c)
    if c.squeeze.batch_size % c.squeeze.accumulation:
        raise ConfigError(
            f"squeeze.accumulation={c.squeeze.accumulation} must divide squeeze.batch_size={c.squeeze.batch_size}."
        )
    if c.squeeze.epochs == 0 and not c.squeeze.weights:
        raise ConfigError("squeeze.epochs=0 needs initial weights in squeeze.weights.")
    if c.squeeze.epochs == 0 and c.regularizer.name != "none":
        raise ConfigError(
            f"regularizer={c.regularizer.name} is about the training of the teacher; squeeze.epochs=0 trains none. Set "
            "squeeze.epochs, or regularizer=none."
        )
    for name in ("every", "fraction"):
        if getattr(c.regularizer, name) != 1 and c.regularizer.name in ("none", "adversarial"):
            raise ConfigError(f"regularizer.{name} thins out a penalty; regularizer={c.regularizer.name} has none.")
    if c.regularizer.name == "none" and c.regularizer.gradients != "auto":
        raise ConfigError("regularizer.gradients chooses how a penalty is computed; regularizer=none has none.")
    if c.regularizer.name == "loss_difference" and c.regularizer.fraction != 1:
        raise ConfigError("regularizer=loss_difference compares whole batches and needs regularizer.fraction=1.")
    if c.regularizer.name == "loss_difference" and c.squeeze.accumulation > 1:
        raise ConfigError("regularizer=loss_difference compares whole batches and needs squeeze.accumulation=1.")
    if c.relabel.teacher_mode == "train" and c.relabel.mode == "stored":
        raise ConfigError("relabel.teacher_mode=train depends on the batch and needs relabel.mode=online.")
    if c.relabel.teacher_mode == "train" and (c.relabel.precision != "float32" or c.relabel.compile):
        raise ConfigError(
            "relabel.precision=bf16 and relabel.compile=true fold batch norm away; relabel.teacher_mode=train needs it."
        )
    if c.evaluate.labels == "hard" and c.relabel.mode == "online":
        raise ConfigError("evaluate.labels=hard asks no teacher; leave relabel.mode=stored.")
    _check_labels(c)
    if c.evaluate.split == "validation" and not c.dataset.validation_per_class:
        raise ConfigError("evaluate.split=validation needs dataset.validation_per_class of at least 1.")
    if c.dataset.stored_size and c.dataset.stored_size < c.dataset.image_size:
        raise ConfigError(
            f"dataset.stored_size={c.dataset.stored_size} must not be smaller than "
            f"dataset.image_size={c.dataset.image_size}."
        )
    _check_loader(c)
    _check_engine(c.engine)
    _check_cluster(c.cluster)
    if len(set(c.evaluate.seeds)) != len(c.evaluate.seeds) or not c.evaluate.seeds:
        raise ConfigError(f"evaluate.seeds={c.evaluate.seeds} must hold at least one seed, each once.")


def _check_arms(c: Config) -> None:
    for name, overrides in c.arms.items():
        if name in ("", ".", "..") or "/" in name:
            raise ConfigError(f"arms: {name!r} must name a folder in that of the experiment.")
        _check_overrides(f"arms.{name}", overrides)


def _check_overrides(key: str, overrides: Any) -> None:
    if not isinstance(overrides, list) or not all(isinstance(text, str) and "=" in text for text in overrides):
        raise ConfigError(f"{key}={overrides} must be a list of key=value.")


def _check_controls(c: Config) -> None:
    for name, overrides in c.controls.items():
        if not name.startswith("control_") or "/" in name:
            raise ConfigError(f"controls.{name} must be called control_…, so that no arm or stage has its name.")
        if name in c.arms:
            raise ConfigError(f"controls.{name} has the name of an arm of the experiment; rename one of them.")
        _check_overrides(f"controls.{name}", overrides)


def _check_recover(c: Config) -> None:
    recover = c.recover
    for name, needed, fits in (
        ("start_grid", "recover.start=random_patches or best_patches", recover.start != "noise"),
        ("start_scale", "recover.start=random_patches or best_patches", recover.start != "noise"),
        ("start_candidates", "recover.start=best_patches", recover.start == "best_patches"),
        ("coarse_factor", "recover.coarse above 0", recover.coarse > 0),
    ):
        if getattr(recover, name) is not None and not fits:
            raise ConfigError(f"recover.{name} belongs to {needed}.")
    if not recover.iterations:
        if recover.start == "noise":
            raise ConfigError(
                "recover.iterations=0 keeps the starting images as they are and needs recover.start=random_patches or "
                "best_patches; noise would stay noise."
            )
        for given, name in (
            (recover.compile, "compile=true"),
            (recover.teachers, "teachers"),
            (recover.statistics == "class", "statistics=class"),
        ):
            if given:
                raise ConfigError(
                    f"recover.{name} is about optimising images; recover.iterations=0 keeps them as they are."
                )
    if recover.start_scale is not None and recover.start_scale[0] > recover.start_scale[1]:
        raise ConfigError(f"recover.start_scale={recover.start_scale} must rise: the smallest area comes first.")
    if recover.crop_per_image and not (recover.crop or recover.flip):
        raise ConfigError("recover.crop_per_image=true needs recover.crop=true or recover.flip=true.")
    factor, size = recover.pooling, c.dataset.image_size
    if recover.coarse and (size % factor or size // factor < 8):
        raise ConfigError(
            f"recover.coarse_factor={factor} must divide dataset.image_size={size} and leave at least 8 pixels."
        )
    if recover.statistics == "class" and recover.classes_per_unit != 1:
        raise ConfigError(
            f"recover.statistics=class matches one class at a time and needs recover.classes_per_unit=1, not "
            f"{recover.classes_per_unit}."
        )
    if recover.statistics == "class" and recover.teachers:
        raise ConfigError("recover.statistics=class collects those of one teacher; leave recover.teachers empty.")
    runs = [Path(run).resolve() for run in [f"{c.run_root}/{c.name}", *recover.teachers]]
    if "" in recover.teachers or len(set(runs)) < len(runs):
        raise ConfigError(f"recover.teachers={recover.teachers} must hold other runs than this one, each once.")


def _check_labels(c: Config) -> None:
    relabel = c.relabel
    for name, codec in (("top_k", "topk"), ("bits", "quantised")):
        if getattr(relabel, name) is not None and relabel.codec != codec:
            raise ConfigError(f"relabel.{name} belongs to relabel.codec={codec}.")
    if relabel.bits is not None and 8 % relabel.bits:
        raise ConfigError(f"relabel.bits={relabel.bits} must fill whole bytes: 1, 2, 4 or 8.")
    if relabel.stored_epochs > relabel.epochs:
        raise ConfigError(
            f"relabel.stored_epochs={relabel.stored_epochs} must not exceed relabel.epochs={relabel.epochs}."
        )
    for name in ("reuse_shift", "reuse_flip"):
        if getattr(relabel, name) and not relabel.stored_epochs:
            raise ConfigError(f"relabel.{name} is about views that are used again; set relabel.stored_epochs.")
    if c.evaluate.labels == "hard":
        for name, given in (("precision", relabel.precision != "float32"), ("compile", relabel.compile)):
            if given:
                raise ConfigError(f"relabel.{name} is about the teacher, which evaluate.labels=hard never asks.")
    for name in ("batch_size", "codec", "stored_epochs"):
        value = getattr(relabel, name)
        if value != getattr(RelabelConfig(), name) and (relabel.mode == "online" or c.evaluate.labels == "hard"):
            reason = "relabel.mode=online" if relabel.mode == "online" else "evaluate.labels=hard"
            raise ConfigError(f"relabel.{name}={value} is about stored labels; {reason} stores none.")


def _check_engine(engine: EngineConfig) -> None:
    if engine.name != "deepspeed":
        for name in ("zero_stage", "deepspeed_config"):
            if getattr(engine, name) not in (None, ""):
                raise ConfigError(f"engine.{name} belongs to engine.name=deepspeed; use engine=deepspeed_zero1.")
        return
    if engine.zero_stage is None:
        raise ConfigError("engine.name=deepspeed needs engine.zero_stage 0, 1 or 2; engine=deepspeed_zero1 sets both.")
    if engine.zero_stage > 2:
        raise ConfigError(
            f"engine.zero_stage={engine.zero_stage} takes parameters away between layers, where the penalty's inner "
            f"gradients still need them; use 0, 1 or 2."
        )


def _check_cluster(cluster: ClusterConfig) -> None:
    if cluster.container_mounts and not cluster.container:
        raise ConfigError("cluster.container_mounts belongs to cluster.container, which is not set.")
    for key in ("dependency", "array", "comment", "output", "error", "job-name", "signal"):
        if key in {str(name).replace("_", "-") for name in cluster.options}:
            raise ConfigError(f"cluster.options.{key} is set by guard launch itself; leave it out.")
    if cluster.executor != "local":
        return
    only_slurm = ("partition", "account", "qos", "constraint", "options", "srun_args", "container")
    given = [name for name in only_slurm if getattr(cluster, name)]
    for stage in ("prepare", "squeeze", "recover", "relabel", "evaluate", "report"):
        given += [f"{stage}.{name}" for name in ("partition", "memory") if getattr(getattr(cluster, stage), name)]
    if given:
        raise ConfigError(f"cluster.{given[0]} is an option of Slurm; cluster={cluster.name} runs on this machine.")
    if cluster.squeeze.nodes > 1:
        raise ConfigError(f"cluster.squeeze.nodes={cluster.squeeze.nodes}: cluster={cluster.name} is one machine.")


def _check_loader(c: Config) -> None:
    if c.loader.name == "ffcv" and c.format.name != "ffcv":
        raise ConfigError(f"loader=ffcv reads .beton files and needs format=ffcv, not format={c.format.name}.")
    given = [name for name in ("jpeg_share", "quality", "side", "resolution") if getattr(c.format, name) is not None]
    if given and c.format.name == "folder":
        raise ConfigError(f"format.{given[0]} belongs to format=ffcv.")
    if c.format.resolution and c.format.resolution < c.dataset.image_size:
        raise ConfigError(
            f"format.resolution={c.format.resolution} must be at least dataset.image_size={c.dataset.image_size}."
        )
    if not c.loader.drop_last and c.regularizer.name in ("loss_difference", "curvature_norm"):
        raise ConfigError(f"regularizer={c.regularizer.name} needs whole batches: leave loader.drop_last=true.")
    given = [name for name in ("sizes", "ramp", "size_step") if getattr(c.loader, name) is not None]
    if c.loader.resolution == "constant":
        if given:
            raise ConfigError(f"loader.{given[0]} belongs to loader.resolution=rising.")
        return
    sizes, ramp = c.loader.sizes, c.loader.ramp
    if sizes is None:
        raise ConfigError("loader.resolution=rising needs loader.sizes, such as [160,192].")
    for name, pair in (("sizes", sizes), ("ramp", ramp)):
        if pair is not None and pair[0] > pair[1]:
            raise ConfigError(f"loader.{name}={pair} must rise.")
    step = c.loader.size_step or 32
    if any(size % step for size in sizes):
        raise ConfigError(f"loader.sizes={sizes} must be multiples of loader.size_step={step}.")
    if c.squeeze.crop != "resized":
        raise ConfigError(f"loader.resolution=rising needs squeeze.crop=resized, not {c.squeeze.crop}.")
    if c.dataset.stored_size and sizes[1] > c.dataset.stored_size:
        raise ConfigError(f"loader.sizes={sizes} must not exceed dataset.stored_size={c.dataset.stored_size}.")
