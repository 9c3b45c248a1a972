"""All runs of a task, a row of runs.jsonl for each that is finished: what exists is not repeated, what was interrupted is."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stable_rnn import Recurrent, Windowed
from stable_rnn.demo.report import whole
from stable_rnn.plans import Plan

from .. import jsonl
from . import measure
from .data import Data
from .models import Config, Model, count, fitting_width
from .tasks import Task
from .train import OutOfTime, Setting, build, evaluate, refined, searched, train

DISTANCE_WINDOWS = [1, 2, 4, 8, 16, 32, 64]
DISTANCE_EPOCHS = 10
DISTANCE_SEED = 1
ROUNDING = 2.0**-23  # of float32


@dataclass
class Bench:
    """One task's folder of results and the means to fill it."""

    task: Task
    data: Data
    out: Path
    log: jsonl.Log
    trials: int  # points of the search that are the same for every model
    refine: int  # further ones, each where the model's own results so far point
    epochs: int
    deadline: float
    progress: Progress

    # ---- files

    def stored(self, name: str, setting: Setting) -> dict | None:
        """The last result of this run; None if there is none, or one of another setting."""
        found = next((row for row in reversed(self.log.rows) if row["run"] == name), None)
        return found if found and found["setting"] == setting.stored() else None

    def weights(self, config: Config, seed: int) -> Path:
        return self.out / "weights" / f"{config.slug}.{seed}.pt"

    # ---- runs

    def setting(self, config: Config, rate: float, dropout: float) -> Setting:
        inputs = self.data.symbols or self.data.train[0][0].shape[1]
        return Setting(
            rate, dropout, fitting_width(config, self.task, inputs, self.data.outputs), self.epochs, self.task.updates
        )

    def points(self, config: Config) -> list[tuple[Setting, float | None]]:
        """The search so far: (setting, loss) of each point, infinite where it diverged; None after the last one, if it is to be run."""
        found: list[tuple[Setting, float | None]] = []
        for n in range(self.trials + self.refine):
            tried = [(setting.rate, setting.dropout, value) for setting, value in found]
            setting = self.setting(config, *(searched(n) if n < self.trials else refined(tried)))
            result = self.stored(f"{config.slug}.search-{n}", setting)
            if result is None:
                return [*found, (setting, None)]
            value = math.inf if result["valid"] is None else result["valid"]
            found.append((setting, -value if self.task.higher_is_better and math.isfinite(value) else value))
        return found

    def search(self, config: Config, n: int) -> None:
        points = self.points(config)
        if points[-1][1] is None and len(points) == n + 1:
            self.run(f"{config.slug}.search-{n}", config, points[-1][0], 0)

    def best(self, config: Config) -> Setting | None:
        """The setting of the best validation score, once the search is done."""
        points = self.points(config)
        return None if points[-1][1] is None else min(points, key=lambda point: point[1])[0]

    def final(self, config: Config, seed: int) -> None:
        setting = self.best(config)
        name = f"{config.slug}.seed-{seed}"
        if setting is None or self.stored(name, setting):
            return

        def more(model: Model) -> dict:
            found: dict = dict(test=measure.finite(evaluate(model, self.task, self.data, self.data.test)))
            self.weights(config, seed).parent.mkdir(exist_ok=True)
            whole(self.weights(config, seed), lambda file: torch.save(model.state_dict(), file))
            if config.recurrent:
                found |= measure.certificates(model, self.task, self.data)
                found["measured"] = measure.forgetting(model, self.data.test)
                found["truncation"] = measure.truncation(model, self.task, self.data)
            return found

        self.run(name, config, setting, seed, more)

    def run(
        self, name: str, config: Config, setting: Setting, seed: int, more: Callable[[Model], dict] = lambda model: {}
    ) -> None:
        begin = time.monotonic()
        bar = self.progress.add_task(name, total=setting.epochs)
        try:
            model = build(config, self.task, self.data, setting, seed)
            curve = train(
                model, self.task, self.data, setting, seed, self.deadline, lambda note: self.progress.advance(bar)
            )
            valid = measure.finite(evaluate(model, self.task, self.data, self.data.valid))
            trained = time.monotonic() - begin
            found = self.about(name, config, setting, seed) | dict(
                parameters=count(model),
                context=getattr(model.body, "context", None),
                valid=valid,
                curve=[measure.finite(v) for v in curve],
                **more(model),
                seconds_training=round(trained, 1),
                seconds=round(time.monotonic() - begin, 1),
            )
            self.log.add(found)
        finally:
            self.progress.remove_task(bar)
        self.progress.console.print(
            f"{name}: validation {valid:.4g}" if valid is not None else f"{name}: diverged", highlight=False
        )

    def about(self, name: str, config: Config, setting: Setting, seed: int) -> dict:
        return dict(
            run=name,
            task=self.task.name,
            config=config.name,
            stability=str(config.stability),
            setting=setting.stored(),
            seed=seed,
            metric=self.task.metric,
            **environment(),
        )

    def distances(self, config: Config) -> None:
        """Truncated training against full: the same start, batches and dropout masks, under `Windowed(k)`; relative distance of weights.
        As a control, full training from weights that are one rounding away: what it amplifies no window can avoid."""
        setting = self.best(config)
        if setting is None or not config.recurrent:
            return
        setting = Setting(
            setting.rate, setting.dropout, setting.width, min(DISTANCE_EPOCHS, setting.epochs), setting.updates
        )
        name, begin = f"{config.slug}.distance", time.monotonic()
        if self.stored(name, setting):
            return
        bar = self.progress.add_task(name, total=setting.epochs * (len(DISTANCE_WINDOWS) + 2))

        def trained(plan: Plan, nudge: float = 1.0) -> Model:
            model = build(config, self.task, self.data, setting, DISTANCE_SEED)
            with torch.no_grad():
                model.body.weight_hh_l0.mul_(nudge)
            train(
                model,
                self.task,
                self.data,
                setting,
                DISTANCE_SEED,
                self.deadline,
                lambda note: self.progress.advance(bar),
                plan,
            )
            return model

        try:
            points, full, start, scale = (
                [],
                None,
                vector(build(config, self.task, self.data, setting, DISTANCE_SEED)),
                1.0,
            )
            for plan in (Recurrent(), *map(Windowed, DISTANCE_WINDOWS)):
                model = trained(plan)
                here = vector(model)
                if full is None:
                    full, scale = here, (here - start).norm().item()
                points.append(
                    dict(
                        k=getattr(plan, "k", None),
                        distance=measure.finite((here - full).norm().item() / scale),
                        test=measure.finite(evaluate(model, self.task, self.data, self.data.test, plan)),
                    )
                )
            rounding = measure.finite((vector(trained(Recurrent(), 1 + ROUNDING)) - full).norm().item() / scale)
            seconds = round(time.monotonic() - begin, 1)
            self.log.add(
                self.about(name, config, setting, DISTANCE_SEED)
                | dict(moved=scale, points=points, rounding=rounding, seconds=seconds)
            )
        finally:
            self.progress.remove_task(bar)

    def speed(self, configs: list[Config], seconds: float) -> None:
        """Races the models whose weights are at hand; written once for the same models, and never in the place of a race of more."""
        models = {}
        for config in configs:
            setting, file = self.best(config), self.weights(config, 1)
            if setting is not None and file.is_file():
                models[config.name] = build(config, self.task, self.data, setting, 1)
                models[config.name].load_state_dict(torch.load(file, weights_only=True))
        file = self.out / "speed.jsonl"
        done = jsonl.read(file)[0] if file.is_file() else {}
        if models and set(done.get("models", ())) < set(models):
            about = dict(task=self.task.name, models=list(models), **environment())
            jsonl.write(file, about, measure.speed(models, self.data, seconds=seconds))


def vector(model: Model) -> torch.Tensor:
    """The recurrent weights, where truncation acts first."""
    return torch.cat([w.detach().flatten() for w in model.body.parameters()])


def environment() -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return dict(
        commit=commit or None,
        torch=torch.__version__,
        machine=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
    )


def run_task(
    task: Task,
    data: Data,
    out: Path,
    configs: list[Config],
    trials: int,
    refine: int,
    seeds: int,
    epochs: int | None = None,
    minutes: float | None = None,
    race_seconds: float = 20.0,
    console: Console | None = None,
) -> bool:
    """Search, final runs, truncated training (JSB), speed; returns whether everything is done. `minutes` is a budget of wall time."""
    log = jsonl.Log(out / "runs.jsonl", resume=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        bench = Bench(task, data, out, log, trials, refine, epochs or task.epochs, deadline, progress)
        jobs = [lambda c=c, n=n: bench.search(c, n) for n in range(trials + refine) for c in configs]
        jobs += [lambda c=c, s=s: bench.final(c, s) for s in range(1, seeds + 1) for c in configs]
        jobs += [lambda c=c: bench.distances(c) for c in configs if task.name == "jsb"]
        jobs += [lambda: bench.speed(configs, race_seconds)]
        whole_bar = progress.add_task(task.title, total=len(jobs))
        for job in jobs:
            try:
                if time.monotonic() > deadline:
                    raise OutOfTime
                job()
            except OutOfTime:
                progress.console.print(
                    f"The budget of {minutes:g} minutes is spent; run the same command again to go on.", highlight=False
                )
                return False
            progress.advance(whole_bar)
    return True
