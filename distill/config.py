"""The typed schema: every option, its unit, its limits and its help, in one place.

YAML files in ``configs/`` set values; they cannot add options. ``compose.py`` reads them, ``limits.py`` holds their
limits. An option that does not change a result (paths,
workers, how often to log) is marked ``result=False`` and stays out of the fingerprints.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from distill.config_cluster import ClusterConfig
from distill.config_machine import EngineConfig, FormatConfig, LoaderConfig, MonitorConfig, SharingConfig
from distill.option import option


@dataclass
class DatasetConfig:
    """The real images: where they come from, their size, and which of them are used."""

    name: str = option("", "name of the data set; the prepared images lie in data_root/name", result=False)
    provider: str = option(
        "folder", "module of data_prep/providers that imports it: folder, torchvision, digits", result=False
    )
    source: str = option(
        "", "folder or zip/tar archive in ImageFolder layout (train/CLASS/IMAGE, val/CLASS/IMAGE)", result=False
    )
    torchvision_class: str = option("", "class of torchvision.datasets, for provider=torchvision", result=False)
    copy: bool = option(False, "copy the images of a source folder instead of referring to them", result=False)
    on_corrupt: str = option(
        "error",
        "an unreadable image stops the import, or is left out and counted",
        choices=("error", "skip"),
        result=False,
    )
    num_classes: int = option(10, "number of classes", low=2)
    image_size: int = option(224, "height and width that the networks see", unit="pixels", low=8)
    stored_size: int = option(
        0,
        "decode once, resize and centre-crop to this square, keep in memory; tests then see the centre of the square. "
        "0: decode each time; tests see the centre of the image at 256/224 of image_size",
        unit="pixels",
        low=0,
    )
    mean: list[float] = option([0.485, 0.456, 0.406], "channel means of normalisation, in [0, 1] pixels", length=3)
    std: list[float] = option([0.229, 0.224, 0.225], "channel deviations of normalisation", length=3, above=0)
    max_per_class: int = option(0, "use this many training images of each class (seeded choice); 0: all", low=0)
    validation_per_class: int = option(
        0, "hold this many images of each class out of the training set, to choose settings on", low=0
    )
    validation_seed: int = option(0, "seed of max_per_class and validation_per_class", low=0)


@dataclass
class NetworkConfig:
    """An image classifier."""

    network: str = option(
        "resnet18", "architecture", choices=("resnet10", "resnet18", "resnet34", "resnet50", "convnet")
    )
    stem: str = option(
        "imagenet",
        "first layers of a ResNet: imagenet is 7x7 stride 2 and max-pool; the others are 3x3 without max-pool",
        choices=("imagenet", "stride1", "stride2", "stride2_pad3"),
    )
    width: int = option(64, "channels of the first stage of a ResNet; of every layer of a ConvNet", low=1)


@dataclass
class SqueezeConfig:
    """Teacher training on the real images (SPEC: squeeze)."""

    epochs: int = option(50, "passes over the training set; 0 takes the initial weights as the teacher", low=0)
    batch_size: int = option(32, "images per optimiser step over all ranks", low=1)
    accumulation: int = option(1, "micro-batches that each rank's share of a batch is cut into", low=1)
    optimizer: str = option("sgd", "optimiser", choices=("sgd", "adamw"))
    lr: float = option(0.025, "peak learning rate", above=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(1e-4, "weight decay", low=0)
    schedule: str = option("cosine", "learning rate over the steps", choices=("cosine", "linear", "step", "constant"))
    step_epochs: list[float] = option([], "epochs after which schedule=step multiplies the learning rate", low=0)
    step_factor: float = option(0.1, "factor of schedule=step", above=0, high=1)
    warmup_epochs: float = option(0.0, "linear warm-up from 0 to lr", unit="epochs", low=0)
    label_smoothing: float = option(0.0, "label smoothing of the clean loss", low=0, high=1)
    precision: str = option("float32", "clean pass; the penalty is always IEEE float32", choices=("float32", "bf16"))
    batchnorm: str = option(
        "local",
        "statistics of each rank's images, of the images of all ranks, or frozen as in the initial weights",
        choices=("local", "sync", "frozen"),
    )
    ema: float = option(0.0, "decay of an exponential moving average that becomes the teacher; 0: off", low=0, below=1)
    weights: str = option(
        "", "initial weights: a .safetensors file, or torchvision:NAME such as torchvision:IMAGENET1K_V1", result=False
    )
    reuse: str = option("", "run folder whose finished teacher is taken, if made with the same options", result=False)
    crop: str = option(
        "resized",
        "training crop: random resized, random after zero padding, or none",
        choices=("resized", "padded", "none"),
    )
    crop_scale: list[float] = option(
        [0.08, 1.0], "area of crop=resized relative to the image", length=2, above=0, high=1
    )
    padding: int = option(4, "padding of crop=padded", unit="pixels", low=0)
    flip: bool = option(True, "flip half of the training images left to right")


@dataclass
class RegularizerConfig:
    """What is added to the squeeze loss. A regulariser takes exactly the options that its YAML file sets."""

    name: str = option("none", "module of distill/regularizers")
    weight: float | None = option(None, "λ of Eq. 11, λ_g of Table 3, or β: the factor of the penalty", low=0)
    h: float | None = option(None, "length of the step along the gradient, L2 in normalised pixels", above=0)
    epsilon: float | None = option(None, "radius of the L∞ ball", unit="1/255", above=0)
    step_size: float | None = option(None, "step of the inner attack", unit="1/255", above=0)
    steps: int | None = option(None, "steps of the inner attack", low=1)
    random_start: bool | None = option(None, "start the inner attack at a random point of the ball")
    h_scaling: bool | None = option(
        None, "h is for image_size: at another resolution it is multiplied by side / image_size"
    )
    every: int = option(
        1, "the penalty is applied on every such step, with so many times the weight; only those steps record it", low=1
    )
    fraction: float = option(
        1.0, "the penalty is taken on this part of the images, weighed to the same mean", above=0, high=1
    )
    gradients: str = option(
        "auto",
        "functorch: double backward by torch.func; auto: the same gradients by first-order passes, for networks of "
        "convolutions, batch norm, ReLU and pooling",
        choices=("auto", "functorch"),
    )
    options: dict[str, Any] = option({}, "further options of a regulariser of your own, passed on as they are")


@dataclass
class RecoverConfig:
    """Distilled images from the teacher (SPEC: recover)."""

    ipc: int = option(10, "images per class", low=1)
    start: str = option(
        "noise",
        "what is optimised: noise (SRe²L), patches of real training images, or those among candidates that the teacher "
        "is surest of (RDED, Sun et al., CVPR 2024)",
        choices=("noise", "random_patches", "best_patches"),
    )
    start_grid: int | None = option(
        None, "an image starts from start_grid² patches, 2x2 in RDED; 1 when unset", low=1, high=8
    )
    start_candidates: int | None = option(
        None, "crops of real images among which start=best_patches chooses each patch; 8 when unset", low=2
    )
    start_scale: list[float] | None = option(
        None,
        "area of a starting patch relative to the real image; [0.08, 1] when unset",
        length=2,
        above=0,
        high=1,
    )
    teachers: list[str] = option(
        [],
        "run folders whose finished teachers are asked too: the mean of the losses of all is minimised (equal votes of "
        "CV-DD, Cui et al., 2025); they must stay where they are, for later stages look at them again",
        result=False,
    )
    statistics: str = option(
        "teacher",
        "batch-norm statistics to match: the teacher's running ones, or those of the real images of each class (LPLD, "
        "Xiao and He, NeurIPS 2024), with classes_per_unit=1",
        choices=("teacher", "class"),
    )
    images_per_class: int = option(1, "images of each class in one unit of work; divides ipc", low=1)
    classes_per_unit: int = option(100, "at most this many classes in one unit of work", low=1)
    iterations: int = option(
        2000,
        "optimisation steps of a unit; 0 keeps real starting images as they are (what says how to optimise then has no "
        "meaning)",
        low=0,
    )
    lr: float = option(0.25, "learning rate of Adam, cosine to 0", above=0)
    betas: list[float] = option([0.5, 0.9], "β of Adam", length=2, low=0, below=1)
    bn_weight: float = option(0.01, "r_bn, the weight of batch-norm matching", low=0)
    first_bn_multiplier: float = option(10.0, "factor of the first batch-norm layer in the matching", low=0)
    crop: bool = option(True, "each iteration sees a random resized crop of the batch")
    crop_scale: list[float] = option([0.08, 1.0], "area of the crop relative to the image", length=2, above=0, high=1)
    crop_per_image: bool = option(
        False,
        "each image has a crop and a flip of its own (DiffAugment, Zhao et al., NeurIPS 2020), in place of one for the "
        "whole batch (SRe²L)",
    )
    coarse: float = option(
        0.0,
        "share of the iterations, the first ones, in which the teacher sees a lower resolution (DeepInversion, Yin et "
        "al., CVPR 2020: 2/3)",
        low=0,
        high=1,
    )
    coarse_factor: int | None = option(
        None, "the lower resolution is image_size / coarse_factor, by average pooling; 2 when unset", low=2
    )
    curriculum: str = option(
        "none",
        "CDA: the smallest crop falls from 1 to crop_scale[0] during the milestone",
        choices=("none", "linear", "cosine", "step"),
    )
    milestone: float = option(1.0, "share of the iterations over which the curriculum falls", low=0, high=1)
    flip: bool = option(True, "each iteration flips the batch with probability ½")
    jitter: int = option(32, "each iteration rolls the batch by 0..jitter in both directions", unit="pixels", low=0)
    precision: str = option(
        "float32",
        "convolutions and features of the teacher; statistics, loss and images are always float32. float32 "
        "convolutions are TF32 on GPUs that have it, as torch sets them",
        choices=("float32", "bf16"),
    )
    compile: bool = option(False, "compile the loss and its gradient; takes a minute once, pays in long recoveries")
    snapshots: list[int] = option([], "iterations at which pictures of unit 0 are kept for TensorBoard", low=0)
    curve_every: int = option(10, "iterations between two points of the stored loss curve", low=1)
    images: str = option(
        "",
        "ready images, taken instead of recovering any (what says how to recover then has no meaning): a folder of one "
        "folder for each class (SRe²L's new000, …), a .pt file of guard export or of the DC line, or MTT's "
        "images_best.pt beside labels_best.pt; they must stay where they are, for later stages look at them again",
        result=False,
    )
    images_mean: list[float] | None = option(
        None,
        "channel means that images of a .pt file were normalised with; dataset.mean when unset",
        length=3,
        result=False,
    )
    images_std: list[float] | None = option(
        None,
        "channel deviations that images of a .pt file were normalised with; dataset.std when unset",
        length=3,
        above=0,
        result=False,
    )
    images_set: int | None = option(
        None,
        "which set of a DC file, that holds one for each experiment; the first, 0, when unset",
        low=0,
        result=False,
    )

    @property
    def reads_real_images(self) -> bool:
        """Whether images are made from real ones too, and not from teachers alone."""
        return self.start != "noise" or self.statistics == "class"

    @property
    def pooling(self) -> int:
        """Side of the squares of pixels that coarse iterations see as one."""
        return self.coarse_factor or 2


@dataclass
class RelabelConfig:
    """Views of the distilled images and the teacher's answers on them (SPEC: relabel)."""

    mode: str = option(
        "stored", "write soft labels, or ask the teacher while the student trains", choices=("stored", "online")
    )
    epochs: int = option(300, "epochs of views, and of student training", low=1)
    batch_size: int = option(
        100, "images per teacher forward pass; with mode=online that is evaluate.batch_size", low=1
    )
    crop: str = option("resized", "crop of a view", choices=("resized", "padded", "none"))
    crop_scale: list[float] = option(
        [0.08, 1.0], "area of crop=resized relative to the image", length=2, above=0, high=1
    )
    padding: int = option(4, "padding of crop=padded", unit="pixels", low=0)
    flip: bool = option(True, "flip half of the views left to right")
    mix: str = option("cutmix", "mix each view with the view of a partner", choices=("cutmix", "mixup", "none"))
    mix_alpha: float = option(1.0, "λ ~ Beta(mix_alpha, mix_alpha)", above=0)
    teacher_mode: str = option(
        "eval", "batch norm of the teacher; train only with mode=online", choices=("eval", "train")
    )
    precision: str = option(
        "float32",
        "the teacher's weights and activations; its last layer is float32. float32 convolutions are TF32 on GPUs that "
        "have it, as torch sets them",
        choices=("float32", "bf16"),
    )
    compile: bool = option(False, "run the teacher through torch.compile, which first takes seconds to minutes")
    codec: str = option(
        "float16",
        "what is stored of the logits: all of them; the largest, with the rest spread evenly; all in a few bits",
        choices=("float16", "topk", "quantised"),
    )
    top_k: int | None = option(None, "logits that codec=topk keeps of each view; 10 when unset", low=1)
    bits: int | None = option(None, "bits of a class with codec=quantised: 1, 2, 4 or 8; 4 when unset", low=1, high=8)
    stored_epochs: int = option(
        0, "only this many epochs of views and labels are stored, and used again in turn; 0: all of them", low=0
    )
    reuse_shift: int = option(
        0, "a stored view that is used again is moved by 0..reuse_shift in each direction", unit="pixels", low=0
    )
    reuse_flip: bool = option(False, "half of the stored views that are used again are mirrored")


@dataclass
class EvaluateConfig:
    """A student trained on the distilled set alone, then tested on real images (SPEC: evaluate)."""

    batch_size: int = option(100, "distilled images per step", low=1)
    labels: str = option("soft", "the teacher's soft labels, or the class labels", choices=("soft", "hard"))
    temperature: float = option(20.0, "T of KL(softmax(t/T) ‖ softmax(s/T))", above=0)
    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adamw"))
    lr: float = option(1e-3, "peak learning rate", above=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(0.01, "weight decay", low=0)
    schedule: str = option("cosine", "learning rate over the steps", choices=("cosine", "linear", "step", "constant"))
    step_epochs: list[float] = option([], "epochs after which schedule=step multiplies the learning rate", low=0)
    step_factor: float = option(0.1, "factor of schedule=step", above=0, high=1)
    warmup_epochs: float = option(0.0, "linear warm-up from 0 to lr", unit="epochs", low=0)
    seeds: list[int] = option([0], "one student is trained for each", low=0)
    split: str = option(
        "test", "real images to test on; validation is held out of training", choices=("test", "validation")
    )
    max_images: int = option(0, "test on this many images (seeded, per class); 0: all", low=0)
    test_batch_size: int = option(250, "images per forward pass when testing", low=1, result=False)
    teacher: bool = option(True, "test and attack the teacher too")


@dataclass
class AttacksConfig:
    """The attacks on teacher and student; a suite is data (SPEC §3)."""

    name: str = option("quick", "name of the suite")
    norm: str = option("Linf", "norm of the ball that epsilon is the radius of (threat model)", choices=("Linf", "L2"))
    epsilon: list[float] = option(
        [1.0],
        "radii of the ball, in 1/255 for Linf and as a length in [0, 1] pixels for L2; attacks without a radius run "
        "once",
        above=0,
    )
    max_images: int = option(0, "attack this many of the test images (seeded, per class); 0: all", low=0)
    batch_size: int = option(256, "images attacked together; outcomes do not depend on it", low=1, result=False)
    forward_batch: int = option(
        32,
        "images in every forward pass of the attacked network; fewer are filled up, so that an outcome does not depend "
        "on which images are attacked together",
        low=1,
    )
    block: int = option(500, "images of one unit of work: a worker that is killed repeats at most so many", low=1)
    sanity_images: int = option(
        100, "images of the checks for gradient masking of every network; 0: no checks", unit="images", low=0
    )
    suite: dict[str, Any] = option({}, "attack name → {attack: torchattacks class, its arguments}")


@dataclass
class Config:
    """Everything that a run is made of."""

    name: str = option("run", "name of the run; its folder is run_root/name", result=False)
    run_root: str = option("runs", "folder of the run folders", result=False)
    data_root: str = option("data", "folder of the prepared data sets", result=False)
    seed: int = option(0, "seed of everything", low=0)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"), result=False)
    threads: int = option(0, "CPU threads of each process; 0 leaves it to torch", low=0, result=False)
    method: str = option("sre2l", "name of the distillation method, for tables", result=False)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    teacher: NetworkConfig = field(default_factory=NetworkConfig)
    student: NetworkConfig = field(default_factory=NetworkConfig)
    squeeze: SqueezeConfig = field(default_factory=SqueezeConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    relabel: RelabelConfig = field(default_factory=RelabelConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    attacks: AttacksConfig = field(default_factory=AttacksConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    arm: str = option("", "run only this arm of the experiment", result=False)
    arms: dict[str, Any] = option({}, "runs of one experiment: name → list of overrides", result=False)
    controls: dict[str, Any] = option(
        {},
        "runs to compare an experiment with, beside its arms; controls=all or some of [random,full,adversarial] adds "
        "them, and what they set wins over the command line",
        result=False,
    )
    published: dict[str, Any] = option({}, "accuracies that the paper states for this setting", result=False)


def result_options(config: Any, *keys: str) -> dict[str, Any]:
    """The options that change results, flat: {"squeeze.lr": 0.025, …}.

    Args:
        keys: sections (``"squeeze"``), single options (``"dataset.mean"``); none means everything.
    """
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for f in fields(node):
            value, key = getattr(node, f.name), prefix + f.name
            if is_dataclass(value):
                walk(value, key + ".")
            elif f.metadata["result"] and (not keys or any(key == k or key.startswith(k + ".") for k in keys)):
                flat[key] = value

    walk(config, "")
    return flat
