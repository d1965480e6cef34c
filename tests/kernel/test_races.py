from __future__ import annotations

from typing import TYPE_CHECKING, Any

import node_process
import pytest
from lab import BRIDGE4, BRIDGE6, CLIENT4, NODE4, Node, Pod, config, mapping

from cni_hostport import names, ownership
from cni_hostport.attachment import Attachment
from cni_hostport.config import NetworkConfig
from cni_hostport.errors import CNIError
from cni_hostport.kernel import routes
from cni_hostport.kernel.nft import Nft
from cni_hostport.ruleset.plan import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TRANSACTION = "transaction"
LISTINGS = ["chains inet", *(f"map inet hostport {name}" for name in names.MAPS)]
AT_EVERY_MOMENT = pytest.mark.parametrize("moment", [*LISTINGS, TRANSACTION], ids=lambda moment: moment.split()[-1])


class RacedNft(Nft):
    """Lets others act, once, right before a listing or before the first transaction that is built on listings."""

    def __init__(self, moment: str, others: Callable[[], object]) -> None:
        super().__init__()
        self._moment, self._others, self._has_listed = moment, others, False

    def listing(self, what: str) -> list[dict[str, Any]]:
        self._reach(what)
        self._has_listed = True
        return super().listing(what)

    def run(self, commands: Sequence[str], *, names_refused: bool = True) -> None:
        if self._has_listed:
            self._reach(TRANSACTION)
        super().run(commands, names_refused=names_refused)

    def _reach(self, moment: str) -> None:
        if moment == self._moment:
            self._moment = ""
            self._others()


class AlwaysRacedNft(Nft):
    """Lets others act before and after every transaction."""

    def __init__(self, before: Callable[[], object], after: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self._before, self._after = before, after

    def run(self, commands: Sequence[str], *, names_refused: bool = True) -> None:
        self._before()
        try:
            super().run(commands, names_refused=names_refused)
        finally:
            self._after()


def attachment(pod: Pod) -> Attachment:
    return Attachment("pods", pod.id, "eth0", pod.path)


def release(nft: Nft, pod: Pod) -> None:
    ownership.release(nft, attachment(pod).key, print)


def claim(nft: Nft, pod: Pod, *mappings: dict[str, Any]) -> None:
    parsed = NetworkConfig.parse(config(pod, *mappings))
    addresses = parsed.prev_result.addresses("eth0")
    ownership.claim(nft, attachment(pod), Request(parsed, addresses, routes.pod_routes(addresses)).plan(), print)


def is_whole(node: Node, pod: Pod, *mappings: dict[str, Any]) -> bool:
    return bool(node.footprint(pod)) and not node.cni("CHECK", pod, config(pod, *mappings)).status


def restarted(node: Node, pod: Pod, addresses: Sequence[str] = ()) -> Pod:
    """Make a living pod with the container ID of another one."""
    made = node.pod(addresses=addresses, gateways=[BRIDGE4, BRIDGE6]) if addresses else node.pod()
    made.id = pod.id
    return made


@pytest.fixture(autouse=True)
def _closing() -> Iterator[None]:
    with node_process.closing():
        yield


@pytest.fixture
def first(node: Node) -> Pod:
    pod = node.pod()
    node.add(pod, mapping(8080))
    return pod


@pytest.fixture
def second(node: Node) -> Pod:
    pod = node.pod()
    pod.serve("tcp", 80, "second")
    return pod


@AT_EVERY_MOMENT
@pytest.mark.parametrize("flushed", [False, True], ids=["deleted", "flushed"])
def test_a_slow_del_takes_nothing_from_the_next_holder(
    node: Node, first: Pod, second: Pod, moment: str, flushed: bool
) -> None:
    def others() -> None:
        if flushed:
            node.nft("flush ruleset")
        else:
            node.delete(first)
        node.add(second, mapping(8080))

    with node.inside():
        release(RacedNft(moment, others), first)
    assert not node.footprint(first)
    assert is_whole(node, second, mapping(8080))
    assert node.client.ask("tcp", NODE4, 8080) == f"second {CLIENT4}"


@AT_EVERY_MOMENT
def test_a_slow_del_of_what_is_added_again_is_all_or_nothing_and_takes_nothing_from_others(
    node: Node, first: Pod, second: Pod, moment: str
) -> None:
    def others() -> None:
        node.delete(first)
        node.add(second, mapping(8080))
        node.add(first, mapping(9090))

    with node.inside():
        release(RacedNft(moment, others), first)
    assert not node.footprint(first) or is_whole(node, first, mapping(9090))
    assert is_whole(node, second, mapping(8080))


@AT_EVERY_MOMENT
@pytest.mark.parametrize("flushed", [False, True], ids=["deleted", "flushed"])
def test_a_slow_taker_of_a_dead_holders_port_takes_nothing_from_the_next_holder(
    node: Node, first: Pod, second: Pod, moment: str, flushed: bool
) -> None:
    def others() -> None:
        if flushed:
            node.nft("flush ruleset")
        else:
            node.delete(first)
        node.add(second, mapping(8080))

    taker = node.pod()
    first.remove()
    with node.inside(), pytest.raises(CNIError) as refused:
        claim(RacedNft(moment, others), taker, mapping(8080))
    assert refused.value.code == 100
    assert second.id[:12] in refused.value.msg
    assert not node.footprint(taker)
    assert is_whole(node, second, mapping(8080))


@AT_EVERY_MOMENT
@pytest.mark.parametrize("same_address", [True, False], ids=["same-address", "other-address"])
def test_a_container_that_restarted_is_not_robbed_by_a_taker_who_saw_it_dead(
    node: Node, first: Pod, moment: str, same_address: bool
) -> None:
    taker = node.pod()
    again = restarted(node, first, first.addresses if same_address else ())
    first.remove()
    with node.inside(), pytest.raises(CNIError) as refused:
        claim(RacedNft(moment, lambda: node.add(again, mapping(8080))), taker, mapping(8080))
    assert refused.value.code == 100
    assert not node.footprint(taker)
    assert is_whole(node, again, mapping(8080))


@AT_EVERY_MOMENT
def test_a_slow_repeated_add_takes_nothing_from_the_next_holder_of_its_old_port(
    node: Node, first: Pod, second: Pod, moment: str
) -> None:
    def others() -> None:
        node.delete(first)
        node.add(second, mapping(8080))

    with node.inside():
        claim(RacedNft(moment, others), first, mapping(9090))
    assert is_whole(node, first, mapping(9090))
    assert is_whole(node, second, mapping(8080))


@AT_EVERY_MOMENT
def test_a_slow_heir_of_an_address_takes_nothing_from_its_holder_that_moved_on(
    node: Node, first: Pod, moment: str
) -> None:
    heir, again = node.pod(addresses=first.addresses), restarted(node, first)
    first.remove()
    with node.inside():
        claim(RacedNft(moment, lambda: node.add(again, mapping(8080))), heir, mapping(9090))
    assert is_whole(node, heir, mapping(9090))
    assert is_whole(node, again, mapping(8080))


@pytest.fixture
def _few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "ATTEMPTS", 3)


@pytest.mark.usefixtures("_few_attempts")
def test_an_add_that_finds_the_port_taken_and_then_free_every_time_says_try_again(node: Node, second: Pod) -> None:
    holder = node.pod()
    with node.inside(), pytest.raises(CNIError) as lost:
        claim(
            AlwaysRacedNft(lambda: node.add(holder, mapping(8080)), lambda: node.delete(holder)), second, mapping(8080)
        )
    assert lost.value.code == 11
    assert not node.holds(second)


@pytest.mark.usefixtures("_few_attempts")
def test_an_add_whose_dead_holder_is_another_every_time_says_try_again(node: Node, second: Pod) -> None:
    def die_with_the_port() -> None:
        pod = node.pod()
        node.add(pod, mapping(8080))
        pod.remove()

    with node.inside(), pytest.raises(CNIError) as lost:
        claim(AlwaysRacedNft(die_with_the_port), second, mapping(8080))
    assert lost.value.code == 11
    assert not node.holds(second)


@pytest.mark.usefixtures("_few_attempts")
def test_a_del_of_what_is_added_again_every_time_says_try_again(node: Node, first: Pod) -> None:
    with node.inside(), pytest.raises(CNIError) as lost:
        release(AlwaysRacedNft(lambda: node.add(first, mapping(8080))), first)
    assert lost.value.code == 11
    assert is_whole(node, first, mapping(8080))
