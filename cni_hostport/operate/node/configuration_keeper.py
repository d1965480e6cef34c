"""This plugin's network configuration, kept in step with the primary plugin's.

Others write in the same directory at any time, some not at once, and some remove a file before they write it again. So a
primary that cannot be used, or is gone, changes nothing for a while; what is left is the last good file. Each update looks
at everything anew: nothing that is remembered can be wrong about the directory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from cni_hostport.kernel import files
from cni_hostport.operate.node.configuration import Configuration, derive, parse_options
from cni_hostport.operate.node.configuration_directory import (
    CILIUM_SUFFIX,
    MULTUS_PREFIX,
    NAMES,
    TEMPORARY,
    Directory,
    Listing,
)
from cni_hostport.operate.node.directory_watch import DirectoryWatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Self

    from cni_hostport.log import Log

# seconds
POLL = 30  # for file systems that tell of no changes, and links on the way to the directory
UNWATCHED_POLL = 5
RETRY = 5  # after an error of the file system
GRACE = 10  # for a primary that is gone; its plugin may be about to write it again
QUIET = 1  # a primary that is being written is not worth a message
PAUSE = 0.05  # between updates, while somebody writes without an end
# as many writes at once, then one in so many seconds: two programs that undo each other's work must not keep a node busy
BURST, REFILL = 10, 10


class Condition(StrEnum):
    """How the directory is."""

    IN_STEP = "in step"
    WAITING = "waiting"
    NOT_IN_STEP = "not in step"


@dataclass(frozen=True)
class State:
    """What an update found and did.

    ``sentence`` is for a person. ``has_hostport`` tells whether the file that a runtime takes now leads to this plugin,
    even if it is not the newest. ``again`` is the number of seconds until another update is due without a change.
    """

    condition: Condition
    sentence: str
    has_hostport: bool = False
    again: float = POLL

    @property
    def is_ready(self) -> bool:
        """Tell whether the next pod gets its host ports, with the options that were given."""
        return self.condition is Condition.IN_STEP and self.has_hostport


class _Postponed(Exception):  # noqa: N818 - not an error: the update ends here
    """Nothing more can be done now."""

    def __init__(self, sentence: str, condition: Condition = Condition.NOT_IN_STEP, again: float = POLL) -> None:
        super().__init__(sentence)
        self.state = State(condition, sentence, again=again)


class Keeper:
    """Keeps a directory's configuration of this plugin right: ``wait``, then ``update``, without an end.

    An agent with a loop of its own watches ``fileno`` instead, and calls ``wait(0)`` when it can be read or ``due`` is over.
    """

    def __init__(
        self, conf_dir: Path, options: Path | None, log: Log, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the directory, a file with options, which is read at each update, and where lines for the operator go."""
        self._directory = Directory(conf_dir)
        self._options_file = options
        self._log = log
        self._clock = clock
        self._watch = DirectoryWatch(TEMPORARY)
        self._updated = float("-inf")
        self._told: dict[str, str] = {}
        self._trouble = ("", 0.0)  # what is wrong with the primary, and since when
        self._written: tuple[str, bytes] | None = None
        self._writes, self._refilled = float(BURST), clock()
        self._disturbance = ""
        self.state = State(Condition.WAITING, f"{conf_dir} has not been looked at", again=0)

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
            time.sleep(max(0.0, min(PAUSE, self._updated + PAUSE - self._clock())))
        return changed or not self.due()

    def update(self) -> State:
        """Look at the directory, put ours right, and return how things are then; raises nothing that files can cause."""
        conf_dir = self._directory.path
        self._watch.drain()
        self._watch.set([conf_dir] + [self._options_file.parent] * (self._options_file is not None))
        self._updated = self._clock()
        try:
            state = self._settle(self._directory.look())
        except _Postponed as postponed:
            state = postponed.state
        except (FileNotFoundError, NotADirectoryError) as error:
            sentence = f"{error.filename or conf_dir} does not exist, or is no directory"
            state = State(Condition.WAITING, sentence)
        except OSError as error:
            sentence = f"{error.filename or conf_dir}: {error.strerror}; {conf_dir} stays as it is"
            state = State(Condition.NOT_IN_STEP, sentence, again=RETRY)
        state = replace(state, has_hostport=self._leads_to_hostport())
        if state.condition is Condition.IN_STEP and not state.has_hostport:
            state = replace(
                state, condition=Condition.NOT_IN_STEP, sentence="the directory is being changed", again=QUIET
            )
        self._tell_watch()
        if self._watch.fault:
            state = replace(state, again=min(state.again, UNWATCHED_POLL))
        if state.condition is not Condition.IN_STEP or self.state.condition is not Condition.IN_STEP:
            self._tell("state", state.sentence)
        self.state = state
        return state

    def _tell_watch(self) -> None:
        line = f"changes are not told by the kernel ({self._watch.fault}): a look every {UNWATCHED_POLL} seconds"
        self._tell("watch", line if self._watch.fault else "")

    def _tell(self, topic: str, line: str) -> None:
        """Write a line once, until another is true."""
        if line and self._told.get(topic) != line:
            self._log(line)
        self._told[topic] = line

    def _settle(self, listing: Listing) -> State:
        """Bring ours in step with the primary; raises ``_Postponed`` and ``OSError``."""
        multus, primary = self._primary(listing)
        self._wait_for_return(listing, primary)
        if primary is None:
            if listing.ours:
                self._remove(listing, "its primary is gone, and the plugins go as well")
            if multus:
                msg = f"{multus[0].file} is multus', and there is no configuration beside it that could have hostport"
                raise _Postponed(msg)
            msg = f"{self._directory.path} has no network configuration yet"
            raise _Postponed(msg, Condition.WAITING)
        self._trouble = ("", 0.0)
        self._tell_others(listing, primary)
        if primary.has_hostport:
            self._remove(listing, f"{primary.file} has hostport itself")
            return State(Condition.IN_STEP, f"{primary.file} has hostport itself: its options are those in that file")
        name = listing.name_before(primary.file, tuple(configuration.file for configuration in multus))
        if name is None:
            behind = f" and behind {multus[-1].file}" if multus else ""
            msg = f"no name for a file of ours sorts before {primary.file}{behind}: {', '.join(NAMES)} were tried"
            raise _Postponed(msg)
        self._put(listing, name, primary)
        if multus and not self._multus_delegates(multus[0], primary, listing):
            msg = (
                f"{multus[0].file} of multus hands pods of {primary.name} to a configuration without hostport: "
                f"restart multus, which then takes {name}, or name that file as its multusMasterCNI"
            )
            raise _Postponed(msg)
        return State(Condition.IN_STEP, f"{name} is derived from {primary.file}")

    def _primary(self, listing: Listing) -> tuple[list[Configuration], Configuration | None]:
        """Return multus' configurations that a runtime takes before all others, and the first of the others."""
        multus = []
        for name in listing.others:
            try:
                configuration = self._directory.read(name)
            except FileNotFoundError:
                continue  # between the listing and now
            except ValueError as fault:
                if not name.startswith(MULTUS_PREFIX):
                    self._be_patient(listing, f"{name} {fault}", QUIET)
                    stays = f"; {next(iter(listing.ours))} stays as it is" if listing.ours else ""
                    msg = f"{name} {fault}{stays}"
                    raise _Postponed(msg) from None
                continue
            if not configuration.is_multus:
                return multus, configuration
            multus.append(configuration)
        return multus, None

    def _be_patient(self, listing: Listing, trouble: str, seconds: float) -> float:
        """Return how long there is this trouble; in the beginning, say that all is as before."""
        if self._trouble[0] != trouble:
            self._trouble = (trouble, self._clock())
        passed = self._clock() - self._trouble[1]
        if passed < min(seconds, QUIET) and listing.ours and self._told:
            raise _Postponed(self.state.sentence, self.state.condition, QUIET - passed)
        return passed

    def _wait_for_return(self, listing: Listing, primary: Configuration | None) -> None:
        """Wait while the file is gone from which ours is derived: it may be about to be written again."""
        for name, data in listing.ours.items():
            ours = Configuration.parse(name, data)
            source = str(ours.source)
            if source in listing.others or (primary and primary.name == ours.name):
                return  # it is there, or was renamed
            left = GRACE - self._be_patient(listing, f"{source} is gone", GRACE)
            if left > 0:
                msg = f"{source} is gone; {name} stays for {GRACE} seconds, for it may be written again"
                raise _Postponed(msg, again=left)

    def _tell_others(self, listing: Listing, primary: Configuration) -> None:
        behind = listing.others[listing.others.index(primary.file) + 1 :]
        line = f"{primary.file} and {', '.join(behind)} are in {self._directory.path}: runtimes take the first"
        self._tell("others", line if behind else "")

    def _remove(self, listing: Listing, reason: str) -> None:
        for name in listing.ours:
            self._directory.remove(name)
            self._log(f"{self._directory.path / name} is removed: {reason}")
        self._written = None

    def _put(self, listing: Listing, name: str, primary: Configuration) -> None:
        """Write ours if it is not as it should be, and remove what is left of it under other names."""
        try:
            derived = derive(primary, self._options())
        except ValueError as fault:
            stays = f"; {next(iter(listing.ours))} stays as it is" if listing.ours else ""
            msg = f"{primary.file} {fault}{stays}"
            raise _Postponed(msg) from None
        if listing.ours.get(name) != derived.data:
            self._spend(listing, name, primary, derived.data)
            self._directory.write(name, derived.data)
            self._written = (name, derived.data)
            for line in (f"{self._directory.path / name} is written, derived from {primary.file}", *derived.notes):
                self._log(line)
        for stale in listing.ours.keys() - {name}:
            self._directory.remove(stale)
            self._log(f"{self._directory.path / stale} is removed: {name} stands for it")
        self._refill()
        if self._disturbance:
            raise _Postponed(self._disturbance, again=REFILL)

    def _refill(self) -> None:
        now = self._clock()
        self._writes = min(float(BURST), self._writes + (now - self._refilled) / REFILL)
        self._refilled = now
        if self._writes >= BURST / 2:
            self._disturbance = ""

    def _spend(self, listing: Listing, name: str, primary: Configuration, data: bytes) -> None:
        """Take the right to write, or raise ``_Postponed`` where that was done too often."""
        self._refill()
        if self._writes >= 1:
            self._writes -= 1
            return
        msg = f"{name} was written {BURST} times in a short time: "
        if self._written == (name, data):
            reason = "changes" if name in listing.ours or name in listing.others else "removes"
            msg += f"another program {reason} it"
            if (self._directory.path / f"{name}{CILIUM_SUFFIX}").exists():
                msg += " (Cilium, which lets no other files be where its option cni.exclusive is true: set it to false)"
            self._disturbance = msg
        else:
            msg += f"{primary.file} changes all the time"
        raise _Postponed(msg, again=(1 - self._writes) * REFILL)

    def _options(self) -> dict[str, Any]:
        if self._options_file is None:
            return {}
        try:
            return parse_options(files.read(self._options_file))
        except OSError as error:
            msg = f"{self._options_file}, with the options, cannot be read: {error.strerror}; nothing is changed"
        except ValueError as fault:
            msg = f"{self._options_file} {fault}; nothing is changed"
        raise _Postponed(msg, again=RETRY)

    def _multus_delegates(self, multus: Configuration, primary: Configuration, listing: Listing) -> bool:
        """Tell whether multus hands pods to a configuration with this plugin, in its file or in another."""
        file = multus.cluster_network
        return file in NAMES and file in self._directory.look().ours if file else multus.delegates_to(primary.name)

    def _leads_to_hostport(self) -> bool:
        """Tell whether the configuration that a runtime takes now leads to this plugin."""
        try:
            listing = self._directory.look()
            name = min([*listing.ours, *listing.others], default="")
            configuration = self._directory.read(name)
            if not configuration.is_multus:
                return configuration.has_hostport
            multus, primary = self._primary(listing)
        except (OSError, ValueError, _Postponed):
            return False
        return primary is not None and self._multus_delegates(multus[0], primary, listing)
