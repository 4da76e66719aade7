"""Suites are checked before anything runs, and what runs is written down in full."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from distill.compose import compose
from distill.errors import ConfigError, MissingPackageError
from distill.preflight import preflight
from distill.robustness import attacks
from distill.robustness.attacks import PlannedAttack, norm_of
from distill.robustness.suite import plan, shipped_suite


def build(one: PlannedAttack, num_classes: int = 10, seed: int = 0) -> dict[str, Any]:
    """The specification, for images of 3x4x4."""
    return attacks.build(one, num_classes, seed, 48).specification


def test_shipped_suites_are_those_of_the_specification() -> None:
    labels = [one.label for one in plan(shipped_suite("paper"), [1.0, 2.0])]
    assert labels == [
        *("pgd100@1", "pgd100@2", "square@1", "square@2", "autoattack@1", "autoattack@2"),
        *("cw", "mim@1", "mim@2"),
    ]
    used = {one.label: build(one, seed=3)["arguments"] for one in plan(shipped_suite("paper"), [1.0])}
    assert used["pgd100@1"] == {"eps": 1 / 255, "alpha": 0.25 / 255, "steps": 100, "random_start": True}
    assert used["square@1"]["n_queries"] == 5000
    assert used["square@1"]["seed"] == used["autoattack@1"]["seed"] == 3
    assert used["autoattack@1"]["n_classes"] == 10
    assert used["cw"]["c"] == 1e-4
    assert used["mim@1"] == {"eps": 1 / 255, "alpha": 1 / 255, "steps": 20, "decay": 1.0}
    (quick,) = plan(shipped_suite("quick"), [16])
    assert build(quick)["arguments"]["alpha"] == pytest.approx(4 / 255)


def test_the_strict_suite_has_the_official_budget() -> None:
    strict = {one.label: attacks.build(one, 1000, 5, 48) for one in plan(shipped_suite("strict"), [2.0])}
    assert list(strict) == ["pgd100@2", "square@2", "autoattack@2", "cw@2", "mim@2"]
    parts = {part["attack"]: part["arguments"] for part in strict["autoattack@2"].specification["ensemble"]}
    assert [parts[name]["steps"] for name in ("APGD", "APGDT", "FAB")] == [100, 100, 100]
    assert parts["Square"]["n_queries"] == strict["square@2"].specification["arguments"]["n_queries"] == 5000
    # APGD, nine targets of APGDT and of FAB, Square: never one for each of a thousand classes.
    assert len(strict["autoattack@2"].stages) == 1 + 9 + 9 + 1
    assert "remark" not in strict["autoattack@2"].specification
    assert (strict["square@2"].seed, strict["autoattack@2"].seed) == (0, 5)
    cw = strict["cw@2"]
    assert (cw.threat.norm, cw.threat.radius) == ("L2", pytest.approx(2 / 255 * 48**0.5))
    assert cw.specification["arguments"] == {"c": 1.0, "kappa": 0, "steps": 100, "lr": 0.01}
    mim = strict["mim@2"].specification["arguments"]
    assert (mim["eps"], mim["alpha"], mim["steps"], mim["decay"]) == (2 / 255, 2 / 255, 20, 1.0)


def test_radii_of_l2_balls() -> None:
    planned = plan(shipped_suite("strict_l2"), [0.25, 0.5], "L2")
    assert [one.label for one in planned][:2] == ["pgd100@L2-0.25", "pgd100@L2-0.5"]
    for one in planned:
        threat = attacks.build(one, 10, 0, 48).threat
        assert (threat.norm, threat.radius) == ("L2", one.epsilon)
    with pytest.raises(
        ConfigError, match=r"attacks\.epsilon holds L2 radii, which do not fit .* PGDL2 is the L2 version"
    ):
        plan({"pgd": {"attack": "PGD"}}, [0.5], "L2")


def test_an_ensemble_names_its_parts() -> None:
    (one,) = plan({"aa": {"attack": "AutoAttack"}}, [8])
    specification = build(one)
    parts = {part["attack"]: part["arguments"] for part in specification["ensemble"]}
    assert list(parts) == ["APGD", "APGDT", "FAB", "Square"]
    assert (parts["APGD"]["steps"], parts["APGDT"]["n_classes"], parts["FAB"]["eps"]) == (10, 10, 8 / 255)
    assert "issue 196" in specification["remark"]


def test_an_own_radius_replaces_the_list() -> None:
    (one,) = plan({"l2": {"attack": "PGDL2", "eps": 0.5, "alpha_ratio": 0.2}}, [1.0, 2.0])
    specification = build(one)
    assert (one.label, specification["arguments"]["alpha"]) == ("l2", 0.1)
    assert norm_of("PGDL2", specification["arguments"]) == specification["threat"]["norm"] == "L2"


def test_a_radius_of_another_name_is_one_too() -> None:
    """PIFGSM's: without it the attack would run once, at a radius of the library's choice."""
    planned = plan({"pi": {"attack": "PIFGSM"}}, [4.0, 8.0])
    assert [one.label for one in planned] == ["pi@4", "pi@8"]
    specification = build(planned[1])
    assert specification["arguments"]["max_epsilon"] == specification["threat"]["radius"] == 8 / 255
    (one,) = plan({"pi": {"attack": "PIFGSM", "max_epsilon": 0.1}}, [4.0])
    assert (one.label, build(one)["threat"]["radius"]) == ("pi", 0.1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"attack": "PDG"}, r"attacks\.suite\.a\.attack=PDG is not one of: APGD, .*PGD, "),
        ({"attack": "MultiAttack"}, r"attacks\.suite\.a\.attack=MultiAttack is not one of"),
        ({"steps": 3}, r"attacks\.suite\.a must name a class"),
        (
            {"attack": "PGD", "step": 20},
            r"attacks\.suite\.a\.step is no argument of PGD, which takes: eps, alpha, steps",
        ),
        ({"attack": "CW", "alpha_ratio": 1}, r"attacks\.suite\.a\.alpha_ratio is no argument of CW, which takes: c, "),
        ({"attack": "PGD", "target": "dog"}, r"attacks\.suite\.a\.target=dog is not one of: least_likely, most_likely"),
        ({"attack": "Square", "target": "random"}, r"attacks\.suite\.a\.target is no argument of Square"),
        ({"attack": "PGD", "source": "student"}, r"attacks\.suite\.a\.source=student is not one of: teacher"),
        ({"attack": "PGD", "repaired": True}, r"attacks\.suite\.a\.repaired is no argument of PGD"),
        ({"attack": "CW", "within_radius": 3}, r"attacks\.suite\.a\.within_radius=3 must be true or false"),
        ({"attack": "PGD", "steps": 2.5}, r"attacks\.suite\.a\.steps=2\.5 must be a whole number of at least 1\."),
        ({"attack": "PGD", "random_start": 1}, r"attacks\.suite\.a\.random_start=1 must be true or false"),
        ({"attack": "CW", "c": "much"}, r"attacks\.suite\.a\.c='much' must be a number of at least 0"),
        ({"attack": "Square", "norm": "L7"}, r"attacks\.suite\.a\.norm=L7 is not one of: Linf, L2"),
        ({"attack": "APGD", "loss": "margin"}, r"attacks\.suite\.a\.loss=margin is not one of: ce, dlr"),
        ({"attack": "PGD", "alpha": 0.1, "alpha_ratio": 1}, r"attacks\.suite\.a sets both alpha and alpha_ratio"),
        ({"attack": "PGDL2"}, r"attacks\.suite\.a\.eps must be set"),
    ],
)
def test_a_wrong_suite_is_one_sentence(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan({"a": entry}, [1.0])


def test_radii_and_names_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"attacks\.epsilon is empty, and attacks\.suite\.a needs"):
        plan({"a": {"attack": "PGD"}}, [])
    assert [one.label for one in plan({"a": {"attack": "CW"}}, [])] == ["a"]
    with pytest.raises(ConfigError, match="each radius once"):
        plan({"a": {"attack": "PGD"}}, [1, 1.0])
    with pytest.raises(ConfigError, match=r"attacks\.suite is empty"):
        plan({}, [1.0])
    with pytest.raises(ConfigError, match=r"no attack suite 'slow' in configs/attacks; there are: .*paper, quick"):
        shipped_suite("slow")


def test_too_few_classes_for_a_targeted_attack() -> None:
    (one,) = plan({"aa": {"attack": "AutoAttack"}}, [1.0])
    with pytest.raises(
        ConfigError, match=r"attacks\.suite\.aa: AutoAttack needs at least 4 classes and the model has 3"
    ):
        build(one, 3)
    (one,) = plan({"fab": {"attack": "FAB", "n_classes": 20}}, [1.0])
    with pytest.raises(ConfigError, match=r"attacks\.suite\.fab\.n_classes=20 must not exceed"):
        build(one)
    (one,) = plan({"dlr": {"attack": "APGD", "loss": "dlr"}}, [1.0])
    with pytest.raises(ConfigError, match=r"attacks\.suite\.dlr: APGD with loss=dlr needs at least 3 classes"):
        build(one, 2)


@pytest.mark.parametrize(
    "given", [["dataset.num_classes=3", "attacks=paper"], ["+attacks.suite.x={attack: FAB, n_classes: 500}"]]
)
def test_what_fits_no_model_of_the_data_set_is_told_before_any_work(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"attacks\.suite\..* the model"):
        preflight(compose(["experiment=demo", *given]), "run")


def test_an_attack_whose_name_is_a_path_is_told_before_any_work() -> None:
    """Its outcome would lie in a folder where no worker looks for it, and all would wait for it."""
    with pytest.raises(ConfigError, match=r"attacks\.suite\.pgd/3 must not hold a /"):
        preflight(compose(["+attacks.suite={pgd/3: {attack: PGD, steps: 3}}"]), "run")


def test_without_torchattacks_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torchattacks":
            raise ModuleNotFoundError("No module named 'torchattacks'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(attacks, "library", attacks.library.__wrapped__)
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps torchattacks==3\.5\.1"):
        attacks.library()
