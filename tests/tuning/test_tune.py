"""kdfast tune: paired seeds, pruning, resumption, and what is recommended with which certainty."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from rich.console import Console

pytest.importorskip("optuna", reason="the tune extra is not installed")

import optuna

from kdfast import tuning
from kdfast.cli import main
from kdfast.demo import settings as demo_settings
from kdfast.demo.corpus import load_corpus
from kdfast.demo.display import Display
from kdfast.demo.student import Student
from kdfast.tuning import ObjectiveError, TuneError, demo, parse_settings, parse_space
from kdfast.tuning.pruning import PairedPruner, end, place
from kdfast.tuning.result import at_the_edge, confirmation, not_told_apart, sentence, trials
from kdfast.tuning.search import Search, Tried


def bowl(settings, seed):
    """Least at temperature 3 and alpha 0.7; a seed shifts all settings alike, and each a little by itself."""
    shift = np.random.default_rng(seed).normal(0, 0.3)
    own = np.random.default_rng([seed, int(settings["temperature"] * 1e6)]).normal(0, 0.005)
    hill = 0.25 * math.log(settings["temperature"] / 3) ** 2 + 0.5 * (settings["alpha"] - 0.7) ** 2
    return float(3 + hill + shift + own)


class Recorded:
    """An objective that remembers how it was called."""

    def __init__(self, value=bowl, reports=()):
        self.value, self.reports, self.calls = value, reports, []

    def __call__(self, settings, seed, report):
        self.calls.append((dict(settings), seed))
        found = self.value(settings, seed)
        for step in self.reports:
            report(step, found + 10 / step)
        return found


SPACE = parse_space(["temperature=1:10:log", "alpha=0:1", "layers=2"])


def search(tmp_path, objective, **changed):
    options = {"display": Display(Console(quiet=True)), "name": "test", "metric": "nats", "out": tmp_path / "out"}
    return tuning.tune(objective, changed.pop("space", SPACE), **(options | changed))


def test_spaces():
    space = parse_space(["temperature=1:8:log", "alpha=0:1", "layers=2:6:int", "loss=kl,jsd", "k=1,2.5", "x=7", "y=on"])
    assert space.fixed == {"x": 7, "y": "on"}
    assert space.described() == {
        "temperature": "1:8:log",
        "alpha": "0:1",
        "layers": "2:6:int",
        "loss": "kl,jsd",
        "k": "1,2.5",
        "x": "7",
        "y": "on",
    }
    assert parse_space([f"{name}={text}" for name, text in space.described().items()]) == space
    assert space.ranges()["layers"] == {"low": 2, "high": 6, "log": False}
    assert {settings["loss"] for settings in space.probes()} == {"kl", "jsd"}
    assert parse_settings("a=1,b=2.5,c=word,d=true") == {"a": 1, "b": 2.5, "c": "word", "d": True}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["temperature"], "is not name=value"),
        (["=1:2"], "is not name=value"),
        (["t=2:1"], "first number must be below"),
        (["t=1:inf"], "both finite"),
        (["t=0:1:log"], "above 0"),
        (["t=1:2:lg"], "neither log nor int"),
        (["t=1.5:2:int"], "whole numbers"),
        (["t=a:b"], "must be numbers"),
        (["t=1:2", "t=3"], "given twice"),
        (["t=a,a"], "same choice"),
        (["t=1"], "nothing to search"),
    ],
)
def test_wrong_spaces(texts, message):
    with pytest.raises(TuneError, match=message):
        parse_space(texts)


def test_a_search_pairs_its_seeds_and_finds_the_bowl(tmp_path):
    objective = Recorded(reports=(1, 2))
    baseline = {"temperature": 1.0, "alpha": 0.0}
    found = search(tmp_path, objective, trial_count=25, seed=5, seeds=3, confirm_seeds=6, baseline=baseline)
    assert found == json.loads((tmp_path / "out" / "tune.json").read_text())

    whole = [row for row in found["trials"] if row["state"] == "complete"]
    assert len(found["trials"]) == 25
    assert 0 < len(whole) < 25  # some were dropped
    assert len(objective.calls) < 25 * 3 + 4 * 6
    for row in found["trials"]:
        assert row["settings"]["layers"] == 2
        assert row["values"] == [bowl(row["settings"], seed) for seed in (5, 6, 7)][: len(row["values"])]
    best = min(whole, key=lambda row: np.mean(row["values"]))
    assert found["best"] == best["number"]
    for row in whole:
        differences = np.subtract(row["values"], best["values"])
        assert row["from_best"]["value"] == pytest.approx(differences.mean(), abs=1e-12)

    recommended = found["recommendation"]
    assert recommended["verdict"] == "better"
    assert recommended["settings"] == best["settings"]
    assert found["confirm_seeds"] == list(range(8, 14))
    first = recommended["finalists"][0]
    assert first["values"] == [bowl(best["settings"], seed) for seed in range(8, 14)]
    differences = np.subtract(first["values"], [bowl(baseline, seed) for seed in range(8, 14)])
    half = scipy.stats.t.ppf(0.975, 5) * differences.std(ddof=1) / math.sqrt(6)
    for name, expected in {"value": 0, "low": -half, "high": half}.items():
        assert first["from_baseline"][name] == pytest.approx(differences.mean() + expected, rel=1e-3)
    assert abs(math.log(best["settings"]["temperature"] / 3)) < 0.7
    assert abs(best["settings"]["alpha"] - 0.7) < 0.35
    assert found["sentence"].startswith("Use layers 2, temperature")
    assert "better by more than chance" in found["sentence"]


def test_maximize_turns_everything_round(tmp_path):
    def hill(settings, seed):
        return -bowl(settings, seed)

    baseline = {"temperature": 10.0, "alpha": 0.0}
    found = search(tmp_path, Recorded(hill), maximize=True, baseline=baseline, confirm_seeds=6)
    whole = [row for row in found["trials"] if row["state"] == "complete"]
    assert found["best"] == max(whole, key=lambda row: np.mean(row["values"]))["number"]
    assert all(row["from_best"]["value"] <= 1e-12 for row in whole)
    assert found["recommendation"]["verdict"] == "better"
    assert found["recommendation"]["finalists"][0]["from_baseline"]["low"] > 0


def finalists(*values):
    return [{"settings": {"t": i}, "values": list(map(float, one))} for i, one in enumerate(values)]


def test_recommendations():
    baseline = {"settings": {"t": 9}, "values": [3.0, 4.0, 5.0, 6.0]}
    for shift, noise, maximize, verdict in (
        (-1.0, 0.1, False, "better"),
        (-1.0, 0.1, True, "worse"),
        (1.0, 0.1, False, "worse"),
        (1.0, 0.1, True, "better"),
        (-0.1, 2.0, False, "not told apart"),
    ):
        values = np.add(baseline["values"], np.multiply([-1, 1, -1, 1], noise)) + shift
        (one,) = finalists(values)
        found = confirmation([one], baseline, maximize=maximize)
        assert found["verdict"] == verdict
        assert found["settings"] == ({"t": 0} if verdict == "better" else {"t": 9})
        text = sentence({"recommendation": found, "confirm_seeds": range(4), "metric": "nats", "maximize": maximize})
        assert text.startswith("Use t 0" if verdict == "better" else "Keep the baseline, t 9")
    alone = confirmation(finalists([1, 2], [2, 3]), None, maximize=False)
    assert alone["verdict"] == "no baseline"
    assert alone["settings"] == {"t": 0}
    assert alone["finalists"][1]["from_best"]["value"] == pytest.approx(1)
    one_seed = confirmation(finalists([1]), {"settings": {"t": 9}, "values": [2.0]}, maximize=False)
    assert one_seed["verdict"] == "not told apart"  # one seed has no interval
    diverged = confirmation(finalists([1, math.nan]), {"settings": {"t": 9}, "values": [2.0, 3.0]}, maximize=False)
    assert diverged["choice"] == "baseline"


def test_the_interval_holds_what_it_says():
    """With no difference in truth, about one search in twenty may claim one; the choice among trials does not add."""
    rng = np.random.default_rng(torch.initial_seed())
    claims = 0
    for _ in range(600):
        search_values = rng.normal(size=(10, 3))
        order = search_values.mean(1).argsort()
        assert order[0] == search_values.mean(1).argmin()
        rows = finalists(*rng.normal(size=(3, 5)))
        baseline = {"settings": {}, "values": rng.normal(size=5).tolist()}
        claims += confirmation(rows, baseline, maximize=False)["verdict"] != "not told apart"
    assert scipy.stats.binomtest(claims, 600, 0.05).pvalue > 1e-6


def test_a_best_at_the_end_of_its_range_is_said():
    searched = parse_space(["t=1:100:log", "a=0:1", "n=1:9:int", "c=x,y"]).ranges()
    assert at_the_edge({"t": 1.2, "a": 0.5, "n": 9, "c": "x"}, searched) == [
        "t is at the lower end of its range",
        "n is at the upper end of its range",
    ]
    assert at_the_edge({"t": 2.0, "a": 0.1, "n": 2, "c": "y"}, searched) == []


def test_dropped_trials_are_compared_over_the_seeds_they_had():
    best = Tried(0, {}, [1.0, 5.0, 3.0], "complete")
    dropped = Tried(1, {}, [1.5], "pruned")
    none = Tried(2, {}, [], "pruned")
    rows = trials([best, dropped, none], best)
    assert rows[1]["from_best"]["value"] == pytest.approx(0.5)  # its mean is 1.5, the best's is 3
    assert rows[2]["from_best"] is None


def test_pruning_compares_the_same_place_of_the_same_seed():
    for maximize, sign in ((False, 1), (True, -1)):
        study = optuna.create_study(direction="maximize" if maximize else "minimize", pruner=PairedPruner(least=4))
        for value in (1.0, 2.0, 3.0, 4.0):
            trial = study.ask()
            trial.report(sign * value, place(0, 100))
            trial.report(sign * (value - 9), end(0))
            study.tell(trial, sign * (value - 9))
        for here, value, dropped in (
            (place(0, 100), 3.2, False),  # within a run three quarters must be better
            (place(0, 100), 3.3, True),
            (end(0), -6.6, False),
            (end(0), -6.4, True),  # at its end half of them
            (place(0, 50), 99.0, False),  # nobody was here
            (end(1), 99.0, False),
        ):
            trial = study.ask()
            trial.report(sign * -99.0, place(0, 10))  # how good it was before says nothing
            trial.report(sign * value, here)
            assert trial.should_prune() is dropped
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    early = optuna.create_study(pruner=PairedPruner(least=2))
    trial = early.ask()
    trial.report(99.0, end(0))
    assert not trial.should_prune()


def test_a_diverging_run_is_not_the_end(tmp_path):
    def value(settings, seed):
        return math.nan if settings["alpha"] > 0.5 else bowl(settings, seed)

    found = search(tmp_path, Recorded(value), baseline={"temperature": 2.0, "alpha": 0.9})
    states = [row["state"] for row in found["trials"]]
    assert "diverged" in states
    assert all((row["state"] == "diverged") == (row["settings"]["alpha"] > 0.5) for row in found["trials"])
    assert found["recommendation"]["choice"] == "baseline"
    assert "unknown, as a run diverged" in found["sentence"]
    with pytest.raises(TuneError, match="all diverged"):
        search(tmp_path, Recorded(lambda *_: math.inf), out=tmp_path / "other", trial_count=2)


class Stop(Exception):
    pass


@pytest.mark.parametrize("hard", [False, True], ids=["asked", "killed"])
def test_an_interrupted_search_goes_on(tmp_path, hard):
    """Whatever moment it stops at, no finished run is repeated, and each trial has all its seeds."""
    done: list[tuple[dict, int]] = []
    limit = iter(itertools.count())
    stops = 0

    class Stopping(Recorded):
        def __call__(self, settings, seed, report):
            if hard and next(limit) % 4 == 3:
                raise Stop
            found = super().__call__(settings, seed, report)
            done.append((dict(settings), seed))
            return found

    objective = Stopping(reports=(1,))
    asked = iter(itertools.count())
    options = {
        "trial_count": 6,
        "confirm_seeds": 2,
        "baseline": {"temperature": 1.0, "alpha": 0.0},
        "interrupted": lambda: not hard and next(asked) % 9 == 8,
    }
    resume = False
    while True:
        try:
            found = search(tmp_path, objective, resume=resume, **options)
            break
        except (tuning.Interrupted, Stop):
            resume, stops = True, stops + 1
            assert stops < 100
    assert stops > 2
    assert len(found["trials"]) == 6
    keys = [(json.dumps(settings), seed) for settings, seed in done]
    assert len(keys) == len(set(keys))
    for row in found["trials"]:
        assert row["values"] == [bowl(row["settings"], seed) for seed in range(3)][: len(row["values"])]

    calls = len(objective.calls)
    again = search(tmp_path, objective, resume=True, **(options | {"interrupted": lambda: False}))
    assert len(objective.calls) == calls  # a finished search only writes its page anew
    assert again["trials"] == found["trials"]
    assert again["recommendation"] == found["recommendation"]
    more = Recorded()
    grown = search(tmp_path, more, resume=True, **(options | {"interrupted": lambda: False, "trial_count": 8}))
    assert len(grown["trials"]) == 8
    assert [row["values"] for row in grown["trials"][:6]] == [row["values"] for row in found["trials"]]


def test_a_folder_holds_one_search(tmp_path):
    quick = {"trial_count": 2, "confirm_seeds": 1}
    with pytest.raises(TuneError, match="holds no search"):
        search(tmp_path, Recorded(), resume=True, **quick)
    search(tmp_path, Recorded(), **quick)
    with pytest.raises(TuneError, match="go on with --resume"):
        search(tmp_path, Recorded(), **quick)
    with pytest.raises(TuneError, match=r"of another search \(seeds \[0, 3\] there and \[0, 2\] now\)"):
        search(tmp_path, Recorded(), resume=True, seeds=2, **quick)
    for baseline, message in (({"alpha": 1}, "lacks temperature"), ({"temperature": 1, "alpha": 1, "q": 1}, "has q")):
        with pytest.raises(TuneError, match=message):
            search(tmp_path, Recorded(), baseline=baseline, out=tmp_path / "new", **quick)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "NoneType None"),
        ("low", "str 'low'"),
        ("1.5", "str '1.5'"),
        (True, "bool True"),
        (1 + 2j, "complex"),
        ([1.0], r"list \[1.0\]"),
        (torch.zeros(3), r"Tensor of shape \(3,\)"),
        (np.zeros((2, 2)), r"ndarray of shape \(2, 2\)"),
        (torch.zeros(0), r"Tensor of shape \(0,\)"),
        (torch.tensor(1 + 2j), "Tensor"),
    ],
    ids=str,
)
def test_what_is_no_number(tmp_path, value, got):
    message = f"objective mine:train must return a number, the metric, got {got}"
    with pytest.raises(ObjectiveError, match=message) as caught:
        search(tmp_path, Recorded(lambda *_: value), name="mine:train", trial_count=1)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, TuneError)

    def reports(settings, seed, report):
        report(1, value)
        return 1.0

    with pytest.raises(ObjectiveError, match=message.replace("return", "report")):
        search(tmp_path, reports, name="mine:train", out=tmp_path / "reports", trial_count=1)


@pytest.mark.parametrize("number", [torch.tensor(2.0), torch.tensor([2.0]), np.float32(2.0), np.array([[2]]), 2])
def test_what_is_a_number(tmp_path, number):
    found = search(tmp_path, Recorded(lambda *_: number), trial_count=1)
    assert found["trials"][0]["values"] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("step", [-1, 0.5, math.nan, math.inf, "1", None])
def test_what_is_no_step(tmp_path, step):
    def reports(settings, seed, report):
        report(step, 1.0)
        return 1.0

    with pytest.raises(ObjectiveError, match="objective test: a step must be a whole number from 0, got"):
        search(tmp_path, reports, trial_count=1)


def test_what_is_no_function(tmp_path):
    with pytest.raises(ObjectiveError, match=r"objective test must be a function of .*, got float"):
        search(tmp_path, 1.0)
    assert not (tmp_path / "out").exists()


def near(values, best=0, fresh=(), *, maximize=False):
    """Numbers of the trials that could not be told from the best."""
    tried = [Tried(i, {"n": i}, list(map(float, one)), "complete") for i, one in enumerate(values)]
    rows = trials(tried, tried[best])
    return not_told_apart(rows, best, ["n"], finalists(*fresh), maximize=maximize)["n"]


def test_what_is_plainly_worse_is_left_out():
    """Of three seeds one trial's interval is 4.3 standard errors wide: all of them say more of the noise."""
    best, alike, worse = [3.0, 4.0, 5.0], [3.02, 4.01, 4.97], [3.5, 4.2, 5.9]
    others = [[3.01, 3.99, 5.04], [3.05, 3.96, 5.03], [3.06, 4.04, 4.98]]
    assert near([best, alike, worse, *others]) == [0, 1, 3, 4, 5]
    assert near(-np.array([best, alike, worse, *others]), maximize=True) == [0, 1, 3, 4, 5]
    mixed = [2.5, 4.9, 6.0]  # better with one seed: the seeds disagree, and it stays
    assert near([best, mixed, *others]) == [0, 1, 2, 3, 4]
    noisy = [[3.9, 4.1, 5.1], [3.1, 4.8, 5.2], [3.2, 4.1, 6.0]]  # nobody can tell these
    assert near([best, *noisy]) == [0, 1, 2, 3]


def test_with_one_seed_the_fresh_ones_say_how_large_chance_is():
    assert near([[1.0], [1.01], [9.0]]) == [0, 1, 2]  # nothing says what one seed means
    assert near([[1.0], [1.01], [9.0]], fresh=[[1.0, 1.1, 1.2], [1.02, 1.09, 1.21]]) == [0, 1]
    assert near([[1.0], [1.01], [9.0]], fresh=[[1.0, 1.1, 1.2], [math.nan, 1.09, 1.21]]) == [0, 1, 2]


def test_equal_trials_are_left_out_seldom():
    """Of trials that differ by chance alone few are called worse, though they stand beside the best of all."""
    rng = np.random.default_rng(torch.initial_seed())
    left = 0
    for _ in range(200):
        values = rng.normal(size=(10, 3))
        left += 10 - len(near(values, best=int(values.mean(1).argmin())))
    assert left < 0.4 * 200 * 9


def test_the_sampler_does_not_repeat_itself_on_resumption(tmp_path):
    def some(count, *, resume):
        made = Search(
            tmp_path,
            Recorded(),
            SPACE,
            [0],
            maximize=False,
            identity={},
            resume=resume,
            interrupted=lambda: False,
            watch=lambda _: None,
        )
        return [json.dumps(one.settings) for one in made.run(count)]

    found = some(3, resume=False) + some(6, resume=True)
    assert len(set(found)) == 6


@pytest.fixture
def kdfast(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["kdfast", "tune", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    yield call
    sys.modules.pop("mine", None)


FACTORY = """
def train(settings, seed, report):
    value = (settings["temperature"] - 3) ** 2 + settings.get("weight", 0) + seed
    report(1, value)
    return value

def short(settings):
    return 0.0

class Broken(Exception):
    pass

def package(settings, seed, report):
    import a_package_that_is_not_there

def broken(settings, seed, report):
    raise Broken("of the user's")

def word(settings, seed, report):
    return "low"
"""


def test_command_on_a_users_function(kdfast, tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    arguments = ["--factory", "mine:train", "--space", "temperature=1:8", "--space", "weight=0,1", "--trials", "6"]
    code, output, _ = kdfast(*arguments, "--baseline", "temperature=8,weight=1", "--metric", "error")
    assert code == 0
    assert "error (less is better), 3 seeds" in output
    assert "Use temperature" in output
    assert "6 trials; ±" in output  # not the best 8 of them
    page = (tmp_path / "kdfast-tune" / "tune.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4  # finalists, a pair, two settings
    assert "better by more than chance explains" in page
    figures = json.loads((tmp_path / "kdfast-tune" / "tune.json").read_text())
    numbers = [float(text) for text in re.findall(r"^ *\d+ +(\d\.?\d*) +\d ", output, re.MULTILINE)]
    assert {f"{row['settings']['temperature']:.4g}" for row in figures["trials"]} == {f"{n:.4g}" for n in numbers}

    code, output, _ = kdfast(*arguments, "--baseline", "temperature=8,weight=1", "--resume", "--json")
    assert code == 0
    assert json.loads(output)["trials"] == figures["trials"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--factory", "mine:train"], "--factory needs --space"),
        (["--factory", "mine:none", "--space", "t=1:2"], "no function 'none'"),
        (["--factory", "mine:short", "--space", "t=1:2"], "must take (settings, seed, report)"),
        (["--factory", "mine:train", "--space", "t=1:2", "--baseline", "t"], "is not name=value"),
        (
            ["--factory", "mine:word", "--space", "t=1:2"],
            "mine:word must return a number, the metric, got str",
        ),
        (["--factory", "mine:package", "--space", "t=1:2"], "needs the package 'a_package_that_is_not_there'"),
        (["--space", "nonsense=1:2"], "no setting nonsense; it has temperature, alpha"),
        (["--space", "alpha=0:2"], "alpha 0 to 1"),
        (["--space", "temperature=a,b"], "must be a number"),
        (["--space", "divergence=jsd,kl"], "kl"),
        (["--baseline", "alpha=0.5"], "lacks temperature"),
        (["--resume"], "holds no search"),
    ],
)
def test_wrong_commands_say_what_to_change(kdfast, tmp_path, arguments, message):
    (tmp_path / "mine.py").write_text(FACTORY)
    code, _, error = kdfast(*arguments)
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "kdfast-tune").exists() or arguments[1] in ("mine:package", "mine:word")


def test_settings_with_brackets_are_shown(kdfast, tmp_path):
    """And one of anything is no plural."""
    (tmp_path / "mine.py").write_text("def train(settings, seed, report):\n    return settings['t']\n")
    arguments = ["--factory", "mine:train", "--space", "t=1,2", "--space", "form=[bold]", "--metric", "nats [red]"]
    code, output, _ = kdfast(*arguments, "--trials", "1", "--seeds", "1", "--confirm", "1")
    assert code == 0
    assert "form [bold]" in output
    assert re.search(r"nats \[red\] \(less is better\), 1 seed\s", output)
    assert "over 1 of 1 seed\n" in output
    assert "1 trial; ±" in output
    assert "on 1 fresh seed, ±" in output
    page = (tmp_path / "kdfast-tune" / "tune.html").read_text()
    text = re.sub(r"<[^>]+>", "", page)
    assert "· 1 trial ·" in text
    assert not re.findall(r"\b1 (?:seeds|trials|threads)\b", text + output)


def test_an_error_of_the_users_keeps_its_traceback(kdfast, tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    with pytest.raises(Exception, match="of the user's") as caught:
        kdfast("--factory", "mine:broken", "--space", "temperature=1:8")
    assert type(caught.value).__name__ == "Broken"


def test_ctrl_c_prints_how_to_go_on(kdfast, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import signal\n\ndef train(settings, seed, report):\n    signal.raise_signal(signal.SIGINT)\n    return 1.0\n"
    )
    arguments = ["--factory", "mine:train", "--space", "temperature=1:8:log", "--trials", "2"]
    code, output, _ = kdfast(*arguments)
    assert code == 130
    assert "kdfast tune --factory mine:train --space temperature=1:8:log --trials 2 --resume" in output


def test_the_demonstration_validates_on_text_of_its_own():
    corpus = load_corpus()
    train, validation = demo.split(corpus)
    assert len(validation) > 10
    assert len(train) + len(validation) == len(corpus.train)
    assert not {file.name for file in train} & {file.name for file in validation}
    assert not {file.name for file in corpus.held_out} & {file.name for file in validation}


def test_the_demonstrations_student(kdfast):
    """A second run of the same settings and seed gives the same value; another temperature another one."""
    length = demo_settings.DemoSettings(
        steps=4, train_sequences=16, warmup=1, probe_every=2, probe_sequences=4, context=32, width=16
    )
    objective = demo.DemoObjective(length, Display(Console(quiet=True)))
    reports: list[tuple[int, float]] = []
    objective.prepare()
    first = objective({"temperature": 2.0}, 0, lambda *one: reports.append(one))
    assert [step for step, _ in reports] == [2]
    assert first == objective({"temperature": 2.0, "alpha": 0.9}, 0, lambda *_: None)
    assert first != objective({"temperature": 4.0}, 0, lambda *_: None)
    with torch.no_grad():
        method, settings = demo.trained_by({"divergence": "jsd", "learning_rate": 1e-3}, length)
        student = Student(settings, method, 0, objective.vocab_size, len(objective.ids))
        logits = student.model(objective.validation[:, :-1]).double()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), objective.validation[:, 1:].flatten())
    assert settings.learning_rate == 1e-3
    assert objective.nats(student) == pytest.approx(expected.item(), rel=1e-5)


def test_the_page_of_the_documentation_runs(kdfast, tmp_path):
    pytest.importorskip("sklearn", reason="the page's data is scikit-learn's, of the extra test")
    page = (Path(__file__).parents[2] / "docs" / "tune.md").read_text(encoding="utf-8")
    (tmp_path / "tuned.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    command = re.search(r"kdfast tune (--factory.*?)```", page, re.DOTALL)[1].replace("\\\n", " ")
    code, output, _ = kdfast(*shlex.split(command), "--trials", "2", "--seeds", "2", "--confirm", "2")
    assert code == 0
    assert "accuracy, % (more is better), 2 seeds" in output
    sys.modules.pop("tuned")
