"""The shipped YAML files, and what a wrong command line is told."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distill.arms import configurations
from distill.compose import compose, config_folder, group_choices, options
from distill.config import Config, result_options
from distill.errors import ConfigError
from distill.graph import STAGES
from distill.run_folder import Recipe

EXPERIMENTS = sorted(group_choices()["experiment"])
CHOICES = [f"{group}={choice}" for group, files in group_choices().items() for choice in files if group != "experiment"]
PAPER_ATTACKS = set(OmegaConf.load(config_folder() / "attacks" / "paper.yaml")["suite"])


@functools.cache
def experiment(name: str) -> Config:
    return compose([f"experiment={name}"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_of_every_experiment_composes(name: str) -> None:
    whole = experiment(name)
    assert whole.name == name
    arms = [compose([f"experiment={name}", *overrides]) for overrides in whole.arms.values()]
    kinds = {str((arm.method, result_options(arm, "regularizer", "squeeze", "recover"))) for arm in arms}
    assert len(kinds) == len(arms), "two arms are the same run"


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_a_group_composes(choice: str) -> None:
    group, name = choice.split("=")
    value = getattr(compose([choice]), group)
    if group == "controls":
        assert list(value) == [f"control_{each}" for each in ("random", "full", "adversarial") if name in (each, "all")]
        return
    assert {"method": value, "engine": getattr(value, "choice", "")}.get(group, getattr(value, "name", "")) == name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_published_accuracies_belong_to_arms_and_attacks(name: str) -> None:
    config = experiment(name)
    assert set(config.published) <= set(config.arms)
    for accuracies in config.published.values():
        assert set(accuracies) == {"clean", *PAPER_ATTACKS}
        assert all(0 <= accuracy <= 100 for accuracy in accuracies.values())
        assert config.attacks.name == "paper"


@pytest.mark.parametrize(
    ("name", "arm", "attack", "accuracy"),
    [
        ("imagenette_ipc10", "guard", "cw", 41.47),
        ("imagenette_table1_ipc10", "guard", "cw", 58.67),
        ("imagenette_table1_ipc1", "adv", "clean", 11.61),
        ("imagenette_table3_ipc50", "gradient_norm_1e-1", "pgd100", 29.17),
        ("tiny_imagenet_ipc100", "sre2l", "mim", 0.24),
        ("imagenet1k_ipc50", "guard", "autoattack", 7.03),
        ("cifar10_ipc10", "guard_cda", "square", 25.66),
    ],
)
def test_published_accuracies_are_the_papers(name: str, arm: str, attack: str, accuracy: float) -> None:
    assert experiment(name).published[arm][attack] == accuracy


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_opens_with_its_command(name: str) -> None:
    lines = group_choices()["experiment"][name].read_text().splitlines()
    assert lines[0] == "# @package _global_"
    comment = [line for line in lines if line.startswith("#")]
    assert any(re.search(rf" run experiment={name}( |$)", line) for line in comment)


def test_base_files_are_no_experiments() -> None:
    bases = {path.stem for path in (config_folder() / "experiment" / "base").glob("*.yaml")}
    assert bases
    with pytest.raises(ConfigError, match="is not one of"):
        compose(["experiment=base/imagenette"])


def test_presets_of_the_specification() -> None:
    """A few numbers of SPEC §2 that a slip in a shared base would change."""
    nette, tiny, cifar = (experiment(f"{name}_ipc10") for name in ("imagenette", "tiny_imagenet", "cifar10"))
    assert (nette.squeeze.lr, nette.squeeze.batch_size, nette.squeeze.epochs) == (0.025, 32, 50)
    assert (nette.recover.bn_weight, nette.recover.iterations, nette.recover.images_per_class) == (0.01, 2000, 10)
    assert (tiny.dataset.image_size, tiny.teacher.stem, tiny.recover.lr) == (224, "stride2_pad3", 0.1)
    assert (cifar.relabel.mix, cifar.relabel.mix_alpha, cifar.evaluate.temperature) == ("mixup", 0.8, 30)
    assert (cifar.recover.crop, cifar.recover.flip) == (False, False)
    cda = compose(["experiment=cifar10_ipc10", *cifar.arms["cda"]])
    assert (cda.recover.curriculum, cda.recover.crop, cda.recover.crop_scale) == ("cosine", True, [0.4, 1.0])
    demo = experiment("demo")
    assert [demo.squeeze.flip, demo.recover.flip, demo.relabel.flip] == [False] * 3, "digits must not be mirrored"


ROWS = {
    # squeeze: lr, batch, epochs, wd, warm-up; recover: lr, r_bn, iterations, jitter; evaluate: epochs, batch, T
    "imagenette_ipc10": ((0.025, 32, 50, 1e-4, 0), (0.25, 0.01, 2000, 32), (300, 100, 20)),
    "imagenet1k_ipc10": ((0.025, 32, 50, 1e-4, 0), (0.25, 0.01, 2000, 32), (300, 100, 20)),
    "imagenet1k_distributed": ((0.8, 1024, 50, 1e-4, 5), (0.25, 0.01, 2000, 32), (300, 100, 20)),
    "tiny_imagenet_ipc50": ((0.025, 32, 50, 1e-4, 0), (0.1, 1.0, 2000, 32), (300, 100, 20)),
    "cifar10_ipc50": ((0.1, 128, 200, 5e-4, 0), (0.25, 0.01, 1000, 4), (400, 128, 30)),
    "sre2l_imagenet1k_ipc50": (None, (0.25, 0.01, 4000, 32), (300, 1024, 20)),
    "sre2l_tiny_imagenet_ipc50": ((0.2, 256, 50, 1e-4, 5), (0.1, 1.0, 4000, 4), (100, 256, 20)),
    "cda_imagenet1k_ipc50": (None, (0.25, 0.01, 4000, 32), (300, 128, 20)),
    "cda_tiny_imagenet_ipc50": ((0.2, 256, 50, 1e-4, 5), (0.4, 0.05, 4000, 4), (100, 256, 20)),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_preset_table_of_the_specification(name: str) -> None:
    """SPEC §2, row by row; without a squeeze the teacher is torchvision's V1 weights."""
    c, (squeeze, recover, evaluate) = experiment(name), ROWS[name]
    own = (c.squeeze.lr, c.squeeze.batch_size, c.squeeze.epochs, c.squeeze.weight_decay, c.squeeze.warmup_epochs)
    if squeeze is None:
        assert (c.squeeze.epochs, c.squeeze.weights) == (0, "torchvision:IMAGENET1K_V1")
    else:
        assert own == squeeze
    assert (c.recover.lr, c.recover.bn_weight, c.recover.iterations, c.recover.jitter) == recover
    assert (c.relabel.epochs, c.evaluate.batch_size, c.evaluate.temperature) == evaluate
    assert (c.recover.betas, c.recover.first_bn_multiplier) == ([0.5, 0.9], 10)
    arms = c.arms.values() or [[]]
    for arm in arms:
        regularizer = compose([f"experiment={name}", *arm]).regularizer
        if regularizer.name == "curvature" and c.dataset.image_size == 224:
            assert (regularizer.weight, regularizer.h) == (100, 3)


def test_the_command_line_beats_an_experiment_and_the_last_one_wins() -> None:
    config = compose(
        ["experiment=demo", "squeeze.epochs=3", "attacks=paper", "attacks.epsilon=[2]", "squeeze.epochs=4"]
    )
    assert (config.squeeze.epochs, config.attacks.name, config.attacks.epsilon) == (4, "paper", [2.0])


def test_a_student_is_its_teacher_unless_told_otherwise() -> None:
    assert compose(["teacher.width=8"]).student.width == 8
    assert compose(["teacher.width=8", "student.width=4"]).student.width == 4


def test_every_option_is_documented() -> None:
    for key, hint, field in options():
        assert field.metadata.get("help", "").strip(), f"{key} has no help"
        assert not field.metadata["choices"] or "str" in str(hint), f"{key} has choices and is no string"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("squeeze.learning_rat=1", ["Unknown key squeeze.learning_rat"]),
        ("sqeeze.lr=1", ["Unknown key sqeeze.lr", "did you mean squeeze.lr"]),
        ("+squeeze.foo=1", ["Unknown key squeeze.foo"]),
        ("hydra.run.dir=x", ["Unknown key hydra.run.dir"]),
        ("squeeze.epochs=many", ["squeeze.epochs", "many"]),
        ("squeeze.epochs=1.5", ["squeeze.epochs", "1.5"]),
        ("squeeze.flip=perhaps", ["squeeze.flip", "perhaps"]),
        ("squeeze.crop_scale=0.3", ["squeeze.crop_scale"]),
        ("squeeze.crop_scale=[0.3]", ["squeeze.crop_scale", "needs 2"]),
        ("squeeze.crop_scale=[1.0,0.5]", ["squeeze.crop_scale", "must rise"]),
        ("squeeze.lr=0", ["squeeze.lr", "greater than 0"]),
        ("squeeze.lr=nan", ["squeeze.lr", "finite"]),
        ("squeeze.momentum=1.5", ["squeeze.momentum", "at most 1"]),
        ("seed=-1", ["seed", "at least 0"]),
        ("attacks.epsilon=[1,0]", ["attacks.epsilon", "greater than 0"]),
        ("teacher.network=resnet99", ["teacher.network", "resnet18"]),
        ("dataset=mnist", ["dataset=mnist", "digits"]),
        ("experiment=nothing", ["experiment=nothing", "demo"]),
        ("regularizer=null", ["regularizer"]),
        ("experiment=demo,imagenette_smoke", ["experiment"]),
        ("squeeze.epochs", ["key=value"]),
        ("evaluate.seeds=0,1", ["'evaluate.seeds=[0,1]'"]),
        ("evaluate.seeds=[0", ["evaluate.seeds=[0", "brackets"]),
        ("evaluate.seeds=3", ["evaluate.seeds=[…]"]),
        ("squeeze.precision=32", ["squeeze.precision=32", "bf16"]),
        ("regularizer.h=2", ["regularizer.h", "regularizer=none"]),
        ("recover.images_per_class=3", ["recover.images_per_class=3", "recover.ipc=10"]),
        ("squeeze.epochs=0", ["squeeze.epochs=0", "squeeze.weights"]),
        ("relabel.teacher_mode=train", ["relabel.teacher_mode", "relabel.mode=online"]),
        ("evaluate.split=validation", ["evaluate.split", "dataset.validation_per_class"]),
        ("evaluate.seeds=[0,0]", ["evaluate.seeds"]),
        ("name=''", ["name"]),
    ],
)
def test_a_wrong_override_is_one_sentence_with_the_full_key(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    "text", ["2026_01_05", "007", "1.10", "true", "lr=0.1", "ü (1), #2~", "a, b", "'a b'", '"it\'s"', "C:\\x("]
)
def test_text_is_taken_as_it_stands(text: str) -> None:
    """Hydra alone reads the first as the number 20260105, and the sixth not at all."""
    quoted = text[0] in "'\""
    assert compose([f"name={text}"]).name == (text[1:-1] if quoted else text)


def test_a_home_folder_is_found_behind_a_key_with_a_dot() -> None:
    assert compose(["dataset.source=~/images"]).dataset.source == str(Path("~/images").expanduser())


def test_an_arm_must_give_a_regularizer_its_own_options() -> None:
    with pytest.raises(ConfigError, match=r"regularizer\.weight of regularizer=curvature must be set"):
        compose(["regularizer=curvature", "regularizer.weight=null"])


def test_result_options_leave_out_what_cannot_change_a_result() -> None:
    kept = result_options(Config())
    assert set(kept) == {key for key, _, field in options() if field.metadata["result"]}
    excluded = {"name", "run_root", "data_root", "device", "loader.workers", "engine.name", "dataset.source", "arms"}
    assert not excluded & set(kept)
    assert {"seed", "squeeze.precision", "dataset.mean", "regularizer.weight", "attacks.suite"} <= set(kept)


def test_result_options_of_a_section() -> None:
    chosen = result_options(Config(), "recover", "dataset.mean")
    assert "dataset.mean" in chosen
    assert "dataset.std" not in chosen
    assert {key.split(".")[0] for key in chosen} == {"recover", "dataset"}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["recover.milestone=0.5"],
            "belongs to recover.curriculum=linear or cosine or step, and recover.curriculum is",
        ),
        (["squeeze.step_epochs=[10]"], "squeeze.step_epochs=[10.0] belongs to squeeze.schedule=step"),
        (["evaluate.step_factor=0.5"], "evaluate.schedule is cosine"),
        (["squeeze.optimizer=adamw", "squeeze.momentum=0.5"], "belongs to squeeze.optimizer=sgd"),
        (
            ["evaluate.labels=hard", "evaluate.temperature=4"],
            "evaluate.temperature=4.0 belongs to evaluate.labels=soft",
        ),
        (
            ["recover.crop=false", "recover.crop_scale=[0.5,1]"],
            "belongs to recover.crop=true, and recover.crop is false",
        ),
        (["squeeze.crop=padded", "squeeze.crop_scale=[0.5,1]"], "belongs to squeeze.crop=resized"),
        (["relabel.padding=2"], "belongs to relabel.crop=padded"),
        (["relabel.mix=none", "relabel.mix_alpha=0.5"], "belongs to relabel.mix=cutmix or mixup"),
        (["experiment=cifar10_ipc10", "arm=sre2l", "recover.milestone=0.5"], "recover.curriculum is none"),
        (["experiment=demo", "controls=full", "arm=control_full", "evaluate.temperature=4"], "labels is hard"),
    ],
)
def test_an_option_that_counts_in_no_run_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configurations(overrides, None)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=cifar10_ipc10", "relabel.mix=none", "relabel.crop=none"],
        ["experiment=cifar10_ipc10", "recover.milestone=0.5"],
        ["experiment=demo", "controls=all", "evaluate.temperature=4"],
        ["experiment=sre2l_tiny_imagenet_ipc50", "evaluate.optimizer=adamw"],
        ["recover.milestone=1", "relabel.padding=4"],
        ["method=cda", "recover.milestone=0.5"],
    ],
)
def test_what_a_preset_sets_or_one_arm_reads_is_not_refused(overrides: list[str]) -> None:
    assert configurations(overrides, None)


def test_a_student_without_stored_labels_has_no_batches_of_a_relabelling() -> None:
    stage = next(stage for stage in STAGES if stage.makes == "student")
    for override, views in (("relabel.mode=online", True), ("evaluate.labels=hard", True), ("relabel.epochs=9", False)):
        config = compose([override])
        kept = set(result_options(config, *stage.options(config)))
        assert ({"relabel.mix", "relabel.epochs"} <= kept) == views
        assert "relabel.batch_size" not in kept


def test_an_option_that_did_not_count_was_not_none() -> None:
    """Without stored labels the options of views count for a student, with them they do not."""
    told = Recipe({"a": 1, "b": None}).differences({"options": {"a": 2, "c": 3}})
    assert told == ["a (was 2, now 1)", "b (did not count, now None)", "c (was 3, does not count now)"]


@pytest.mark.parametrize("folder", ["mine", "with a space"])
def test_a_folder_of_ones_own(tmp_path: Path, folder: str) -> None:
    root = tmp_path / folder
    (root / "regularizer").mkdir(parents=True)
    (root / "experiment").mkdir()
    (root / "regularizer" / "mine.yaml").write_text("name: mine\nweight: 2.0\noptions: {power: 3}\n")
    own = (
        "# @package _global_\ndefaults:\n  - base/imagenette\n  - _self_\n  - override /regularizer: mine\nname: own\n"
    )
    (root / "experiment" / "own.yaml").write_text(own)
    config = compose(["experiment=own"], root)
    assert (config.regularizer.name, config.regularizer.options) == ("mine", {"power": 3})
    assert (config.name, config.dataset.name) == ("own", "imagenette")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weight: 2.0\n", "mine.yaml has no name; it begins with the line name: mine."),
        ("name: other\nweight: 2.0\n", "other.yaml, line 2, is no YAML"),
    ],
)
def test_a_group_of_ones_own_says_what_it_is(tmp_path: Path, text: str, words: str) -> None:
    """Without a name a regulariser would be a plain training."""
    (tmp_path / "regularizer").mkdir()
    (tmp_path / "regularizer/mine.yaml").write_text(text)
    (tmp_path / "regularizer/other.yaml").write_text("name: [\n")
    with pytest.raises(ConfigError) as caught:
        compose(["regularizer=mine"], tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("squeeze: {lrr: 3}\n", "squeeze.lrr"),
        ("squeeze: {lr: [3\n", "own.yaml"),
        ("squeeze: 3\n", "experiment/own"),
        ("name: \udcff\n", "is no UTF-8"),
        ("# @package experiment\nname: own\n", "begins with the line # @package _global_"),
        ("arms: {a: [], b: squeeze.lr=3}\n", "arms.b=squeeze.lr=3 must be a list of key=value"),
        ("arms: {a: null}\n", "arms.a=None must be a list of key=value"),
        ("arms: {a: [1]}\n", "arms.a=[1] must be a list of key=value"),
        ("arms: {..: []}\n", "arms: '..' must name a folder"),
    ],
)
def test_a_wrong_file_of_ones_own_is_one_sentence(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(
        text if text.startswith("#") else f"# @package _global_\n{text}", errors="surrogateescape"
    )
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=own"], tmp_path)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_of_ones_own() -> None:
    with pytest.raises(ConfigError, match="/nowhere"):
        compose([], "/nowhere")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["relabel.precision=bf16"], "relabel.precision is about the teacher"),
        (["relabel.compile=true"], "relabel.compile is about the teacher"),
        (["relabel.codec=topk"], "is about stored labels"),
    ],
)
def test_hard_labels_ask_no_teacher(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(["evaluate.labels=hard", *given])
