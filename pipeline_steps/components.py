"""What `pleat airflow` runs, each below a guard (`pipeline_steps.guard`): started, watched, started again, ended."""

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline_steps.errors import PleatError
from pipeline_steps.progress import say

BIN = Path(sys.executable).parent
POLL_S = 0.5
STOP_WITHIN_S = 10
DEATHS, DEATHS_WITHIN_S = 3, 600  # a component that dies this often is not started again


class Component:
    """One process below a guard."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.command, self.log = name, command, log
        self.deaths: list[float] = []

    def start(self, root: Path, environment: Mapping[str, str]) -> None:
        """Starts it in `root`; its output is appended to the log."""
        guard = [sys.executable, "-m", "pipeline_steps.guard", "--", *self.command]
        with self.log.open("ab") as output:
            # In a session of its own: Ctrl-C reaches only this process, which ends the others in order.
            self.process = subprocess.Popen(
                guard,
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def last_lines(self) -> str:
        """The end of its log, for a message."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-12:])


class Components:
    """What runs at present."""

    def __init__(self, root: Path, environment: dict[str, str], output: Path) -> None:
        self.root, self.environment, self.output = root, environment, output
        self.running: dict[str, Component] = {}
        output.mkdir(exist_ok=True)
        for old in list(output.glob("*.log")):  # one start's output, and that of the start before
            if not old.name.endswith(".previous.log"):
                old.replace(old.with_suffix(".previous.log"))

    def start(self, name: str, *command: str) -> None:
        """Starts a command of this environment, which is watched from then on."""
        component = Component(name, [str(BIN / command[0]), *command[1:]], self.output / f"{name}.log")
        component.start(self.root, self.environment)
        self.running[name] = component

    def finish(self, name: str, *command: str) -> None:
        """Runs a command to its end, the others meanwhile going on."""
        self.start(name, *command)
        while self.running[name].process.poll() is None:
            time.sleep(POLL_S / 10)
        if self.running[name].process.returncode:
            self._give_up(self.running[name], f"`{' '.join(command)}` failed")
        del self.running[name]
        self.check()

    def check(self) -> None:
        """Raises PleatError when a component has died."""
        for component in self.running.values():
            if component.process.poll() is not None:
                self._give_up(component, f"{component.name} {_how(component)} while it started")

    def restart_dead(self) -> None:
        """Starts what has died again, with a line on the terminal; raises PleatError for what keeps dying."""
        for component in self.running.values():
            if component.process.poll() is None:
                continue
            now = time.monotonic()
            component.deaths = [death for death in component.deaths if now - death < DEATHS_WITHIN_S] + [now]
            if len(component.deaths) >= DEATHS:
                self._give_up(component, f"{component.name} died {DEATHS} times, the last time it {_how(component)}")
            say(f"{component.name} {_how(component)} and is started again; its last lines in {component.log}:")
            say(component.last_lines())
            component.start(self.root, self.environment)

    def stop(self) -> None:
        """Ends every component with all processes below it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # The execution API first: a task that is ended can then report no failure; the next start takes it up again.
        first = [component for component in self.running.values() if component.name == "execution-api"]
        others = [component for component in self.running.values() if component.name != "execution-api"]
        for group in (first, others):
            for component in group:
                component.process.terminate()
            for component in group:
                try:
                    component.process.wait(STOP_WITHIN_S)  # the guard kills what does not end by itself
                except subprocess.TimeoutExpired:
                    guard = component.process.pid
                    say(f"{component.name} has not ended yet; its guard, process {guard}, goes on trying.")

    def _give_up(self, component: Component, what: str) -> None:
        raise PleatError(f"{what}; the last lines of {component.log}:\n{component.last_lines()}")


def _how(component: Component) -> str:
    status = component.process.returncode
    return f"was ended by {signal.Signals(status - 128).name}" if status > 128 else f"ended with status {status}"
