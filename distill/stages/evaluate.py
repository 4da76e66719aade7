"""Evaluate, second half: teacher and students on real test images, clean and attacked (SPEC §2-3)."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.config import Config, result_options
from distill.data.batch import Batch
from distill.data.loaders import read_images, samples, test_loader
from distill.data.samples import Samples
from distill.errors import ConfigError
from distill.files import digest, load_tensors, save_tensors, write_json
from distill.models import Normalize, load_teacher
from distill.progress import Progress
from distill.provenance import environment
from distill.robustness import sanity
from distill.robustness.attacks import PlannedAttack, check_classes
from distill.robustness.metrics import attack_label, ratios, summarise
from distill.robustness.results import AttackResult
from distill.robustness.runner import run_attack, top_accuracy
from distill.robustness.suite import plan
from distill.run_folder import RESULTS, read_manifest
from distill.stages.student import load_student
from distill.stages.work import Work
from distill.training.monitor import SHOWN


@dataclass(frozen=True)
class Outcome:
    """One file of ``outcomes/``: what one network answers on a block of images under one attack; or, clean, on all."""

    network: str
    attack: PlannedAttack | None
    block: int = 0

    @property
    def file(self) -> str:
        """For instance ``seed0.pgd20@4.0000.safetensors``."""
        if self.attack is None:
            return f"{self.network}.clean.safetensors"
        return f"{self.network}.{self.attack.label}.{self.block:04d}.safetensors"

    @property
    def checks(self) -> bool:
        """Whether this is a part of a check for gradient masking."""
        return self.attack is not None and self.attack.name.startswith(sanity.PREFIX)


def planned_outcomes(config: Config, attacked: int = 1) -> list[Outcome]:
    """Everything that is to be tested, with so many images under attack.

    Raises:
        ConfigError: the attacks do not fit torchattacks, or the number of classes.
    """
    networks = ["teacher"] if config.evaluate.teacher else []
    networks += [f"seed{seed}" for seed in config.evaluate.seeds]
    options = config.attacks
    attacks = plan(options.suite, options.epsilon, options.norm) if options.suite else []
    if taken := next((attack.name for attack in attacks if attack.name.startswith(sanity.PREFIX)), None):
        raise ConfigError(f"attacks.suite.{taken} must not begin with {sanity.PREFIX}, which names our own checks.")
    for attack in attacks:
        if "/" in attack.name:
            raise ConfigError(f"attacks.suite.{attack.name} must not hold a /: files of outcomes have its name.")
        check_classes(attack, config.dataset.num_classes)
    blocks = range(-(-attacked // options.block))
    outcomes = []
    for network in networks:
        outcomes.append(Outcome(network, None))
        outcomes += [Outcome(network, attack, block) for attack in attacks for block in blocks]
        if attacks and options.sanity_images and options.epsilon:
            outcomes += [Outcome(network, each) for each in sanity.checks(options.norm, options.epsilon, network)]
    return outcomes


def run(work: Work) -> None:
    """Make ``outcomes/`` and ``results.json``. Workers share the outcomes."""
    testing = _Testing(work)
    outcomes = planned_outcomes(work.config, len(testing.attacked))

    def make(number: int, path: Path, progress: Progress) -> None:
        testing.make(outcomes[number], path)
        progress.update()

    def finish() -> None:
        results = _results(work, outcomes)
        write_json(work.run / RESULTS, results)
        work.artifact.finish()
        _show(work, results)
        if work.config.monitor.tensorboard:
            work.monitor.images(0, "images", testing.images(0).images[:SHOWN])

    work.share([outcome.file for outcome in outcomes], make, finish, "evaluate", "outcome", quiet=True)


class _Testing:
    """Networks and images of one process, loaded when they are first needed."""

    def __init__(self, work: Work):
        self.work, self.config, self.device = work, work.config, work.processes.device
        self.quiet = not work.processes.main
        options = work.config.evaluate
        tested = samples(work.config, work.prepared, options.split).choose(options.max_images, work.config.seed)
        self.attacked: Samples = tested.choose(work.config.attacks.max_images, work.config.seed)

    def make(self, outcome: Outcome, path: Path) -> None:
        """Compute one outcome and write its file."""
        model, options = self.model(outcome.network), self.config.attacks
        if outcome.attack is None:
            loader = test_loader(
                self.config,
                self.work.prepared,
                split=self.config.evaluate.split,
                max_images=self.config.evaluate.max_images,
                batch_size=self.config.evaluate.test_batch_size,
                device=self.device,
            )
            clean = top_accuracy(model, loader, forward_batch=options.forward_batch, quiet=self.quiet)
            save_tensors(path, {"correct": clean.correct, "in_top5": clean.in_top5}, result=json.dumps(clean.as_json()))
            return
        images = self.images(-1 if outcome.checks else outcome.block)
        result = run_attack(
            model,
            images,
            self.right(outcome.network, -1 if outcome.checks else outcome.block),
            outcome.attack,
            num_classes=self.config.dataset.num_classes,
            seed=self.config.seed,
            batch_size=options.batch_size,
            forward_batch=options.forward_batch,
            source=self.teacher if outcome.attack.arguments.get("source") else None,
            quiet=self.quiet,
        )
        tensors = {"robust": result.robust, "right": result.right, "indices": images.indices}
        facts = {"forward": result.forward, "backward": result.backward, "specification": result.specification}
        save_tensors(path, tensors, result=json.dumps(facts))

    @functools.lru_cache(maxsize=1)  # noqa: B019 - one network at a time, for the life of this object
    def model(self, network: str) -> nn.Module:
        """A network that takes images in [0, 1]."""
        if network == "teacher":
            return self.teacher
        student = load_student(self.work, int(network.removeprefix("seed")))
        return nn.Sequential(self.normalize, student)

    @functools.cached_property
    def teacher(self) -> nn.Module:
        """The teacher, which takes images in [0, 1]."""
        return nn.Sequential(self.normalize, load_teacher(self.work.run / "teacher", self.device))

    @property
    def normalize(self) -> Normalize:
        """In front of every network."""
        return Normalize(self.config.dataset.mean, self.config.dataset.std).to(self.device)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def right(self, network: str, block: int) -> Tensor:
        """bool (N,), which images of a block a network gets right when nobody attacks them."""
        batch = self.images(block)
        return top_accuracy(
            self.model(network), [batch], forward_batch=self.config.attacks.forward_batch, quiet=True
        ).correct

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def images(self, block: int) -> Batch:
        """The images of a block that are attacked, in memory; -1: those of the checks."""
        count, size = len(self.attacked), self.config.attacks.block
        if block < 0:
            positions = sanity.subset(count, self.config.attacks.sanity_images)
        else:
            positions = np.arange(block * size, min((block + 1) * size, count))
        chosen = self.attacked.take(positions)
        return read_images(self.config, self.work.prepared, chosen, self.config.evaluate.test_batch_size)


def _results(work: Work, outcomes: list[Outcome]) -> dict[str, Any]:
    config, run = work.config, work.run
    distilled = read_manifest(run / "distilled", "distilled")
    networks: dict[str, dict[str, Any]] = {}
    for (name, label), parts in _grouped(outcomes).items():
        entry = networks.setdefault(name, {"attacks": [], "checks": []})
        if not label:
            load_tensors(work.folder / parts[0].file)
            entry["clean"] = _facts(work.folder / parts[0].file)
        else:
            entry["checks" if parts[0].checks else "attacks"].append(_joined(work.folder, parts).as_json())
    students = []
    for name, entry in networks.items():
        checked = entry.pop("checks")
        judged = sanity.judge(entry["attacks"], checked) if checked else None
        entry.update(ratios(entry), sanity=judged, seed=None if name == "teacher" else int(name.removeprefix("seed")))
        if name != "teacher":
            students.append(entry)
    return {
        "name": config.name,
        "method": config.method,
        "regularizer": {key: value for key, value in asdict(config.regularizer).items() if value not in (None, {})},
        "dataset": config.dataset.name,
        "ipc": distilled["ipc"],
        "seed": config.seed,
        "split": config.evaluate.split,
        "fingerprint": digest(work.artifact.recipe.as_json()),
        "config_fingerprint": digest(result_options(config)),
        "provenance": environment(),
        "labels": _stored_labels(run),
        "recover": _recovery(distilled),
        "published": config.published,
        "teacher": networks.get("teacher"),
        "students": students,
        "summary": summarise(students),
    }


def _grouped(outcomes: list[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """The blocks of each attack on each network, in order."""
    grouped: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        label = "" if outcome.attack is None else outcome.attack.label
        grouped.setdefault((outcome.network, label), []).append(outcome)
    return grouped


def _joined(folder: Path, parts: list[Outcome]) -> AttackResult:
    """One result from the files of its blocks."""
    attack = parts[0].attack
    assert attack is not None
    tensors = [load_tensors(folder / part.file) for part in parts]
    facts = [_facts(folder / part.file) for part in parts]
    robust, right = (torch.cat([each[name] for each in tensors]) for name in ("robust", "right"))
    forward, backward = (sum(each[name] for each in facts) for name in ("forward", "backward"))
    known = (attack.name, attack.norm, attack.epsilon, robust, right)
    return AttackResult(*known, forward, backward, facts[0]["specification"])


def _recovery(distilled: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the distilled images: their last losses, or where ready ones come from."""
    if "source" in distilled:
        return {"source": distilled["source"]}
    return {"bn_loss": distilled["final"]["batchnorm_matching"], "teacher_top1": distilled["teacher_top1"]}


def _stored_labels(run: Path) -> dict[str, Any] | None:
    """How the soft labels are stored and in how many bytes; None when none are."""
    if not (run / "labels/manifest.json").is_file():
        return None
    manifest = read_manifest(run / "labels", "labels")
    return {name: manifest[name] for name in ("codec", "stored_epochs", "bytes")}


def _facts(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["result"])
    return facts


def _show(work: Work, results: dict[str, Any]) -> None:
    """Every accuracy as a scalar, and the table of attacks as text."""
    rows = ["| network | attack | images | accuracy |", "|---|---|---|---|"]
    for name, attack, count, accuracy in _accuracies(results):
        rows.append(f"| {name} | {attack} | {count} | {100 * accuracy:.2f} % |")
        work.monitor.scalars(0, {attack: accuracy}, name)
    work.monitor.text("attacks", "\n".join(rows))


def _accuracies(results: dict[str, Any]) -> Iterator[tuple[str, str, int, float]]:
    networks = [*([results["teacher"]] if results["teacher"] else []), *results["students"]]
    for network in networks:
        name = "teacher" if network["seed"] is None else f"seed{network['seed']}"
        yield name, "top1", network["clean"]["count"], network["clean"]["top1"]
        yield name, "top5", network["clean"]["count"], network["clean"]["top5"]
        for attack in network["attacks"]:
            yield name, attack_label(attack), attack["count"], attack["accuracy"]
