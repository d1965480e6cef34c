"""This plugin's network configuration, kept in step with the primary plugin's.

Others write in the same directory at any time, some not at once, and some remove a file before they write it again. So
a primary that cannot be used, or is gone, changes nothing for a while: the last good file stays. Each update looks at
everything anew, and what is remembered only decides when to write and what to say.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cni_hostport.kernel import files
from cni_hostport.operate.node.allowance import Allowance
from cni_hostport.operate.node.configuration import Configuration, derive, parse_options
from cni_hostport.operate.node.configuration_directory import (
    CILIUM_SUFFIX,
    MULTUS_PREFIX,
    NAMES,
    TEMPORARY,
    Directory,
    Listing,
)
from cni_hostport.operate.node.configuration_state import Condition, PostponedError, State
from cni_hostport.operate.node.directory_watch import DirectoryWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Self

    from cni_hostport.log import Log

# seconds
UNWATCHED_POLL = 5
RETRY = 5  # after an error of the file system
GRACE = 10  # for a primary that is gone; its plugin may be about to write it again
QUIET = 1  # a primary that is being written is not worth a message
PAUSE = 0.05  # between updates, while somebody writes without an end
# writes at once, and then the seconds between two: programs could undo each other's work, and each write wakes runtimes
BURST, REFILL = 10, 10


class Keeper:
    """Keeps this plugin's configuration right in a directory: ``wait``, then ``update``, without an end.

    An agent with a loop of its own watches ``fileno`` instead, and calls ``wait(0)`` when that can be read or after
    ``due`` seconds.
    """

    def __init__(
        self,
        conf_dir: Path,
        options: Path | None,
        log: Log,
        obstacle: Callable[[Sequence[str]], str] = lambda _: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the directory, a file with options that each update reads, and who gets lines for the operator.

        ``obstacle`` says, of the types of the primary's plugins, why a node that has only that should stay so for now.
        """
        self._directory = Directory(conf_dir)
        self._options_file = options
        self._log = log
        self._obstacle = obstacle
        self._clock = clock
        self._watch = DirectoryWatch(TEMPORARY)
        self._updated = float("-inf")
        self._told: dict[str, str] = {}
        self._trouble = ("", 0.0)  # what is wrong with the primary, and since when
        self._written: tuple[str, bytes] | None = None
        self._writes = Allowance(BURST, REFILL, clock)
        self._disturbance = ""
        self.state = State(Condition.WAITING, f"{conf_dir} has not been looked at")

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Watch nothing any more; the configuration stays."""
        self._watch.close()

    def fileno(self) -> int:
        """Return a descriptor that can be read when something has changed; -1 where the kernel has none to give."""
        return self._watch.fileno()

    def due(self) -> float:
        """Return in how many seconds an update is due without any change."""
        return max(0.0, self._updated + self.state.again - self._clock())

    def wait(self, timeout: float) -> bool:
        """Wait for so many seconds at most, and tell whether an update is due."""
        changed = self._watch.wait(min(timeout, self.due()))
        if changed:
            time.sleep(min(PAUSE, max(0.0, self._updated + PAUSE - self._clock())))
        return changed or not self.due()

    def update(self) -> State:
        """Look at the directory, put ours right, and return how things are then; raises nothing that files cause."""
        conf_dir = self._directory.path
        self._watch.drain()
        self._watch.set([conf_dir, *([self._options_file.parent] if self._options_file else [])])
        self._updated = self._clock()
        try:
            state = self._settle(self._directory.look())
        except PostponedError as postponed:
            state = postponed.state
        except (FileNotFoundError, NotADirectoryError):
            state = State(Condition.WAITING, f"{conf_dir} does not exist, or is no directory")
        except OSError as error:
            sentence = f"{conf_dir}: {error.strerror}; what is there stays as it is"
            state = State(Condition.NOT_IN_STEP, sentence, again=RETRY)
        state = replace(state, has_hostport=self._leads_to_hostport())
        if state.condition is Condition.IN_STEP and not state.has_hostport:
            sentence = f"{conf_dir} is being changed"
            state = replace(state, condition=Condition.NOT_IN_STEP, sentence=sentence, again=QUIET)
        if self._watch.fault:
            state = replace(state, again=min(state.again, UNWATCHED_POLL))
        fault = f"the kernel does not tell of changes ({self._watch.fault}): a look every {UNWATCHED_POLL} seconds"
        self._tell("watch", fault if self._watch.fault else "")
        if Condition.IN_STEP not in {state.condition, self.state.condition} or state.condition != self.state.condition:
            self._tell("state", state.sentence)
        self.state = state
        return state

    def _tell(self, topic: str, line: str) -> None:
        """Write a line once, until another is true."""
        if line and self._told.get(topic) != line:
            self._log(line)
        self._told[topic] = line

    def _settle(self, listing: Listing) -> State:
        """Bring ours in step with the primary; raises ``PostponedError`` and ``OSError``."""
        multus, primary = self._primary(listing)
        self._wait_for_return(listing, primary)
        if primary is None:
            self._remove(listing, "its primary is gone, and the plugins go as well")
            if multus:
                msg = f"{multus[0].file} is multus', and no configuration beside it could have hostport"
                raise PostponedError(msg)
            msg = f"{self._directory.path} has no network configuration yet"
            raise PostponedError(msg, Condition.WAITING)
        self._trouble = ("", 0.0)
        behind = ", ".join(listing.others[listing.others.index(primary.file) + 1 :])
        line = f"{primary.file} and {behind} are in {self._directory.path}: runtimes take the first"
        self._tell("others", line if behind else "")
        if primary.has_hostport:
            name = primary.file
            state = State(Condition.IN_STEP, f"{name} has hostport itself: the options are those in that file")
            self._remove(listing, f"{name} has hostport itself")
        else:
            name = self._put(listing, primary, [configuration.file for configuration in multus])
            state = State(Condition.IN_STEP, f"{name} is derived from {primary.file}")
        if multus and not self._multus_has_hostport(multus[0]):
            msg = (
                f"{multus[0].file} of multus hands pods to a configuration without hostport: restart multus, "
                f"which then takes {name}, or give it that file as its multusMasterCNI"
            )
            raise PostponedError(msg)
        return state

    def _primary(self, listing: Listing) -> tuple[list[Configuration], Configuration | None]:
        """Return multus' configurations that come before all others, and the first of the others."""
        multus: list[Configuration] = []
        for name in listing.others:
            try:
                configuration = self._directory.read(name)
            except FileNotFoundError:
                # since the listing, of which the rest may be as old
                sentence, condition = self.state.sentence, self.state.condition
                raise PostponedError(sentence, condition, again=PAUSE, is_passing=True) from None
            except ValueError as fault:
                if name.startswith(MULTUS_PREFIX):
                    continue
                self._be_patient(listing, f"{name} {fault}")
                msg = f"{name} {fault}{_stays(listing)}"
                raise PostponedError(msg) from None
            if not configuration.is_multus:
                return multus, configuration
            multus.append(configuration)
        return multus, None

    def _be_patient(self, listing: Listing, trouble: str) -> float:
        """Return for how long there is this trouble; in the beginning, all is as before."""
        if self._trouble[0] != trouble:
            self._trouble = (trouble, self._clock())
        passed = self._clock() - self._trouble[1]
        if listing.ours and passed < QUIET:
            raise PostponedError(self.state.sentence, self.state.condition, again=QUIET - passed, is_passing=True)
        return passed

    def _wait_for_return(self, listing: Listing, primary: Configuration | None) -> None:
        """Wait while the file is gone from which ours is derived: it may be about to be written again."""
        for name, data in listing.ours.items():
            ours = Configuration.parse(name, data)
            if ours.source in listing.others or (primary and primary.name == ours.name):
                return  # it is there, or has another name
            left = GRACE - self._be_patient(listing, f"{ours.source} is gone")
            if left > 0:
                msg = f"{ours.source} is gone; {name} stays for {GRACE} seconds, for it may be written again"
                raise PostponedError(msg, again=left, is_passing=True)

    def _remove(self, listing: Listing, reason: str) -> None:
        for name in listing.ours:
            self._directory.remove(name)
            self._log(f"{self._directory.path / name} is removed: {reason}")

    def _put(self, listing: Listing, primary: Configuration, multus: list[str]) -> str:
        """Write ours if it is not as it should be, remove what is left of it elsewhere, and return its name."""
        name = listing.name_before(primary.file, multus)
        if name is None:
            behind = f" and behind {multus[-1]}" if multus else ""
            msg = f"no free name sorts before {primary.file}{behind}: {', '.join(NAMES)} were tried"
            raise PostponedError(msg)
        try:
            derived = derive(primary, self._options())
        except ValueError as fault:
            msg = f"{primary.file} {fault}{_stays(listing)}"
            raise PostponedError(msg) from None
        if not listing.ours and (obstacle := self._obstacle(primary.types)):
            raise PostponedError(obstacle, again=RETRY)
        if listing.ours.get(name) != derived.data:
            self._take_allowance(listing, name, primary, derived.data)
            self._directory.write(name, derived.data)
            self._written = (name, derived.data)
            self._log(f"{self._directory.path / name} is written, derived from {primary.file}")
            for note in derived.notes:
                self._tell(note, note)
        for stale in listing.ours.keys() - {name}:
            self._directory.remove(stale)
            self._log(f"{self._directory.path / stale} is removed: {name} stands for it")
        if self._disturbance and not self._writes.is_ample():
            raise PostponedError(self._disturbance, again=REFILL)
        self._disturbance = ""
        return name

    def _take_allowance(self, listing: Listing, name: str, primary: Configuration, data: bytes) -> None:
        wait = self._writes.take()
        if not wait:
            return
        msg = f"{name} was written {BURST} times in a short time: "
        if self._written == (name, data):
            msg += f"another program {'changes' if name in listing.ours else 'removes'} it"
            if (self._directory.path / f"{name}{CILIUM_SUFFIX}").exists():
                msg += ": Cilium, whose option cni.exclusive must be false beside other programs' configurations"
            self._disturbance = msg
        else:
            msg += f"{primary.file} changes again and again"
        raise PostponedError(msg, again=wait)

    def _options(self) -> dict[str, Any]:
        if self._options_file is None:
            return {}
        try:
            return parse_options(files.read(self._options_file))
        except OSError as error:
            msg = f"{self._options_file}, with the options, cannot be read: {error.strerror}; nothing is changed"
        except ValueError as fault:
            msg = f"{self._options_file} {fault}; nothing is changed"
        raise PostponedError(msg, again=RETRY)

    def _multus_has_hostport(self, multus: Configuration) -> bool:
        """Tell whether multus hands pods to a configuration with this plugin, of another file or in its own."""
        try:
            file = multus.cluster_network
            return self._directory.read(file).has_hostport if file else multus.delegates_to_hostport
        except (OSError, ValueError):
            return False

    def _leads_to_hostport(self) -> bool:
        """Tell whether the configuration that a runtime takes now leads to this plugin."""
        try:
            listing = self._directory.look()
            first = min([*listing.ours, *listing.others], key=os.fsencode, default="")
            configuration = self._directory.read(first)
        except (OSError, ValueError):
            return False
        return self._multus_has_hostport(configuration) if configuration.is_multus else configuration.has_hostport


def _stays(listing: Listing) -> str:
    return f"; {', '.join(listing.ours)} stays as it is" if listing.ours else ""
