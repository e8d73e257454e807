"""A discrete-event model of a cluster that runs the units of one phase after the other.

Nodes are launched when a phase asks for them, arrive later, are slower or faster, and may be taken away;
what ran on them is lost and runs again. The driver starts one unit after the other. When processors are idle, late units (`late_units`, the engine's own) get a second copy.
Draws are seeded by name: equal parameters give equal events. Times are in seconds, work is in
core-seconds.
"""

import bisect
import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipeline.engine.stragglers import late_units
from pipeline.engine.units import Resources
from stages.pack.pack import derive_seed
from stages.storage.ledger import Unit

TICK = 5.0  # how often the engine looks for late units
NEVER = math.inf


@dataclass(frozen=True)
class Cloud:
    """The machines, and what happens to them. `NO_FAULTS` has none of it."""

    cores: int = 16
    # of a node with 32 GiB, what Ray offers to tasks: 70 %
    memory: int = 24_050_000_000
    # Ray 2.60's autoscaler (v2) launches 10 machines at once, in rounds of 5 s. EC2 would take 1,000 at
    # once, and then 2 a second (docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html)
    launch_burst: float = 10
    launch_rate: float = 2.0
    # until Ray runs on it: assumption (boot, image, ray start), lognormal
    startup_seconds: float = 90.0
    startup_sigma: float = 0.3
    # spot: AWS says under 5 % a month for most types (0.0001); assumption: a bad day
    preemptions_per_hour: float = 0.02
    # until Ray notices: 5 checks 3 s apart, and a restart (pipeline.engine.attempts)
    detection_seconds: float = 20.0
    # assumption: one node in a hundred takes three times as long; the others differ by 5 %
    slow_share: float = 0.01
    slow_factor: float = 3.0
    speed_sigma: float = 0.05
    # cluster.yaml
    idle_timeout: float = 300.0
    # the driver, for each task that it starts and settles: benchmarks.costs, `dispatch`
    dispatch_seconds: float = 0.0
    # S3: 100 to 200 ms for small objects and first bytes, 85 to 90 MB/s a connection (AWS,
    # "Performance guidelines for Amazon S3"); sigma and 503s are assumptions
    request_seconds: float = 0.12
    request_sigma: float = 0.5
    bytes_per_second: float = 85e6
    refused_share: float = 0.001
    backoff_seconds: float = 1.0
    # of units that kill their worker every time
    poison_share: float = 0.0


NO_FAULTS = Cloud(
    launch_burst=1e9,
    startup_seconds=0.0,
    preemptions_per_hour=0.0,
    slow_share=0.0,
    speed_sigma=0.0,
    request_seconds=0.0,
    refused_share=0.0,
)


class Load(NamedTuple):
    """What a unit takes: core-seconds on a node of speed 1, requests one after the other, bytes."""

    seconds: float
    requests: float = 0.0
    bytes: float = 0.0


class Settled(NamedTuple):
    """How a unit ended: when, and after how many seconds of its last attempt; `failed`: never."""

    unit: int
    time: float
    seconds: float
    failed: bool = False


@dataclass
class Trace:
    """What happened in a phase. `dry` is when the last unit had been started for the first time.

    `attempts` are (start, end, whether its work counts); `copies` were started a second time.
    """

    name: str
    begin: float
    cpus: float
    settled: list[Settled] = field(default_factory=list)
    attempts: list[tuple[float, float, bool]] = field(default_factory=list)
    dry: float = 0.0
    end: float = 0.0
    copies: int = 0
    dispatched: int = 0

    @property
    def useful(self) -> float:
        """Core-seconds of attempts that committed their unit."""
        return self.cpus * sum(end - start for start, end, counts in self.attempts if counts)

    @property
    def lost(self) -> float:
        """Core-seconds of attempts that were killed."""
        return self.cpus * sum(end - start for start, end, counts in self.attempts if not counts)


@dataclass(eq=False)
class Node:
    """A machine: when it was launched, arrives and ends; `free` slots in the phase that runs.

    `loaded` slots have had a unit of the phase.
    """

    number: int
    launched: float
    arrives: float
    ends: float
    speed: float
    free: int = 0
    idle_since: float = 0.0
    running: set[int] = field(default_factory=set)
    loaded: int = 0
    alive: bool = True


@dataclass
class _Attempt:
    unit: int
    node: Node
    start: float
    end: float


class Cluster:
    """Machines over a whole run. `clock` is now, `history` are all machines there have been."""

    def __init__(self, nodes: int, cloud: Cloud, *, seed: int = 0) -> None:
        self.most, self.cloud, self.seed = nodes, cloud, seed
        self.clock, self.tokens, self.tokens_at = 0.0, float(cloud.launch_burst), 0.0
        self.nodes: dict[int, Node] = {}
        self.history: list[Node] = []
        self.traces: list[Trace] = []

    def run(
        self,
        name: str,
        units: Sequence[Unit],
        loads: Sequence[Load],
        resources: Resources,
        *,
        patience: float = 60.0,
        attempts: int = 3,
        load_seconds: float = 0.0,
    ) -> Trace:
        """Run a phase to its end; `clock` is then when its last unit settled.

        `load_seconds` is what the first unit on a slot takes longer: imports and models.
        """
        phase = _Phase(self, name, units, loads, resources, patience, attempts, load_seconds)
        trace = phase.run()
        self.clock = trace.end
        self.traces.append(trace)
        return trace

    def launch(self, count: int) -> list[Node]:
        """Ask for machines; the ones beyond the rate limit are launched later."""
        cloud, launched = self.cloud, []
        refill = (self.clock - self.tokens_at) * cloud.launch_rate
        self.tokens, self.tokens_at = min(cloud.launch_burst, self.tokens + refill), self.clock
        for _ in range(count):
            self.tokens -= 1
            at = self.clock + max(0.0, -self.tokens) / cloud.launch_rate
            launched.append(self._node(len(self.history), at))
            self.history.append(launched[-1])
        self.nodes |= {node.number: node for node in launched}
        return launched

    def withdraw(self) -> None:
        """Take back what was asked for and has not been launched yet."""
        for node in [n for n in self.nodes.values() if n.launched > self.clock]:
            self.end(node, node.launched)
            self.tokens += 1

    def _node(self, number: int, at: float) -> Node:
        cloud = self.cloud
        rng = np.random.default_rng(derive_seed(self.seed, "simulate.node", str(number)))
        startup = cloud.startup_seconds * float(rng.lognormal(0.0, cloud.startup_sigma))
        speed = float(rng.lognormal(0.0, cloud.speed_sigma)) if cloud.speed_sigma else 1.0
        speed /= cloud.slow_factor if rng.random() < cloud.slow_share else 1.0
        hours = (
            float(rng.exponential(1 / cloud.preemptions_per_hour))
            if cloud.preemptions_per_hour
            else NEVER
        )
        return Node(
            number, at, at + startup, at + startup + 3600 * hours, speed, idle_since=at + startup
        )

    def end(self, node: Node, at: float) -> None:
        """A machine is taken or given back."""
        node.ends, node.alive, node.free = at, False, 0
        del self.nodes[node.number]

    @property
    def paid(self) -> float:
        """Core-seconds of all machines so far, from launch to end."""
        return self.cloud.cores * sum(
            max(0.0, min(n.ends, self.clock) - n.launched) for n in self.history
        )


def nodes_wanted(units: int, resources: Resources, cloud: Cloud, *, most: int) -> int:
    """How many machines a phase asks the autoscaler for: what its units left can use."""
    at_once = min(units, resources.parallelism or units)
    return min(most, math.ceil(at_once / slots_of(resources, cloud)))


def slots_of(resources: Resources, cloud: Cloud) -> int:
    """How many units fit a machine; a unit that wants more memory than there is gets all of it."""
    memory = min(resources.memory, cloud.memory) or 1
    return max(1, int(min(cloud.cores / resources.num_cpus, cloud.memory / memory)))


class _Phase:
    """The event loop of one phase. An event is (time, number, method, argument)."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        units: Sequence[Unit],
        loads: Sequence[Load],
        resources: Resources,
        patience: float,
        attempts: int,
        load_seconds: float,
    ) -> None:
        self.cluster, self.cloud, self.units = cluster, cluster.cloud, units
        self.resources, self.patience, self.attempts = resources, patience, attempts
        self.load_seconds = load_seconds
        self.trace = Trace(name, cluster.clock, resources.num_cpus)
        self.slots = slots_of(resources, self.cloud)
        self.loads, self.store_seconds = loads, self._draw_store_seconds(name, loads)
        rng = np.random.default_rng(derive_seed(cluster.seed, "simulate.poison", name))
        self.poison = rng.random(len(units)) < self.cloud.poison_share
        self.pending = deque(range(len(units)))
        self.left = dict.fromkeys(range(len(units)))
        self.seconds: dict[int, float] = {}
        self.crashes: dict[int, int] = {}
        self.copied: set[int] = set()
        self.rates: list[float] = []
        self.smallest = min(units, key=lambda unit: unit.bytes)
        self.running: dict[int, _Attempt] = {}
        self.of_unit: defaultdict[int, list[int]] = defaultdict(list)
        self.free: deque[Node] = deque()
        self.events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self.numbers, self.driver_free = itertools.count(), cluster.clock
        self.idle_since: float | None = None
        self.ticking = False

    def run(self) -> Trace:
        self._begin()
        while self.left:
            self.cluster.clock, _, handle, argument = heapq.heappop(self.events)
            handle(argument)
            self._start_pending()
        self.trace.end = self.cluster.clock
        self.cluster.withdraw()
        return self.trace

    # --- machines ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        now, cluster = self.cluster.clock, self.cluster
        for node in [n for n in cluster.nodes.values() if n.ends <= now]:
            cluster.end(node, node.ends)  # taken between the phases
        wanted = nodes_wanted(len(self.left), self.resources, self.cloud, most=cluster.most)
        ready = sorted(
            cluster.nodes.values(), key=lambda n: (n.arrives > now, -n.idle_since, n.number)
        )
        for node in ready[wanted:]:
            self._at(max(now, node.idle_since + self.cloud.idle_timeout), self._expire, node)
        for node in ready:
            node.free, node.loaded, node.running = 0, 0, set()
            self._at(max(now, node.arrives), self._arrive, node)
        self._ask()

    def _ask(self) -> None:
        wanted = nodes_wanted(len(self.left), self.resources, self.cloud, most=self.cluster.most)
        for node in self.cluster.launch(max(0, wanted - len(self.cluster.nodes))):
            self._at(node.arrives, self._arrive, node)

    def _arrive(self, node: Node) -> None:
        if not node.alive:
            return
        node.free = self.slots
        self.free.append(node)
        if node.ends < NEVER:
            self._at(node.ends, self._taken, node)

    def _expire(self, node: Node) -> None:
        if node.alive and not node.running:
            self.cluster.end(node, self.cluster.clock)

    def _taken(self, node: Node) -> None:
        if not node.alive:
            return
        self.cluster.end(node, self.cluster.clock)
        for number in sorted(node.running):
            unit = self.running[number].unit
            self._stop(number, counts=False)
            if not self.of_unit[unit]:
                self._at(self.cluster.clock + self.cloud.detection_seconds, self._retry, unit)
        self._ask()

    # --- units ------------------------------------------------------------------------------------

    def _start_pending(self) -> None:
        while self.pending and self._room():
            self._start(self.pending.popleft())
            if not self.pending and not self.trace.dry:
                self.trace.dry = self.driver_free
        if not self.pending and not self.ticking and self.left:
            self.ticking = True
            self._at(self.cluster.clock + min(TICK, self.patience / 4), self._tick, None)

    def _room(self) -> bool:
        most = self.resources.parallelism
        if most and len(self.running) >= most:
            return False
        while self.free and not self.free[0].free:
            self.free.popleft()
        return bool(self.free)

    def _start(self, unit: int) -> None:
        node = self.free[0]
        node.free -= 1
        if node.free:
            self.free.rotate(-1)
        self.driver_free = max(self.driver_free, self.cluster.clock) + self.cloud.dispatch_seconds
        start = self.driver_free
        seconds = self.loads[unit].seconds / node.speed + self.store_seconds[unit]
        if node.loaded < self.slots:
            node.loaded += 1
            seconds += self.load_seconds / node.speed
        crashes = bool(self.poison[unit])
        attempt = _Attempt(unit, node, start, start + (seconds / 2 if crashes else seconds))
        number = next(self.numbers)
        self.trace.dispatched += 1
        self.running[number] = attempt
        self.of_unit[unit].append(number)
        node.running.add(number)
        self._at(attempt.end, self._crash if crashes else self._finish, number)

    def _finish(self, number: int) -> None:
        attempt = self.running.get(number)
        if attempt is None:
            return
        unit = attempt.unit
        self._stop(number, counts=True)
        self.seconds[unit] = attempt.end - attempt.start
        for other in list(self.of_unit[unit]):
            self._stop(other, counts=False)
        self._settle(unit)

    def _settle(self, unit: int, *, failed: bool = False) -> None:
        del self.left[unit]
        seconds = self.seconds.get(unit, 0.0)
        self.trace.settled.append(Settled(unit, self.cluster.clock, seconds, failed))
        if not failed:
            bisect.insort(self.rates, seconds / max(1, self.units[unit].bytes))

    def _crash(self, number: int) -> None:
        attempt = self.running.get(number)
        if attempt is None:
            return
        self._stop(number, counts=False)
        self.crashes[attempt.unit] = self.crashes.get(attempt.unit, 0) + 1
        if self.crashes[attempt.unit] < self.attempts:
            self._retry(attempt.unit)
            return
        for other in list(self.of_unit[attempt.unit]):
            self._stop(other, counts=False)
        self._settle(attempt.unit, failed=True)

    def _retry(self, unit: int) -> None:
        if unit in self.left and not self.of_unit[unit]:
            self.pending.appendleft(unit)

    def _stop(self, number: int, *, counts: bool) -> None:
        attempt = self.running.pop(number)
        now, node = self.cluster.clock, attempt.node
        self.of_unit[attempt.unit].remove(number)
        node.running.remove(number)
        node.idle_since = now
        if node.alive:
            node.free += 1
            if node.free == 1:
                self.free.append(node)
        if attempt.start < now:
            self.trace.attempts.append((attempt.start, now, counts))

    # --- late units -------------------------------------------------------------------------------

    def _tick(self, _: object) -> None:
        self.ticking = False
        now = self.cluster.clock
        room = 0 if self.pending else sum(node.free for node in self.cluster.nodes.values())
        if self.resources.parallelism:
            room = min(room, self.resources.parallelism - len(self.running))
        self.idle_since = (
            (self.idle_since if self.idle_since is not None else now) if room > 0 else None
        )
        if self.idle_since is None:
            return
        if not self._late([self.smallest]):
            return  # and so is none of the others
        candidates = [u for u in self.left if u not in self.copied and self.of_unit[u]]
        by_name = {self.units[u].name: u for u in candidates}
        for unit in self._late([self.units[u] for u in candidates])[:room]:
            if self._room():
                self.copied.add(by_name[unit.name])
                self.trace.copies += 1
                self._start(by_name[unit.name])

    def _late(self, units: Sequence[Unit]) -> list[Unit]:
        # `late_units` takes the median, and these are sorted already
        rates = [self.rates[len(self.rates) // 2]] if self.rates else []
        waited = self.cluster.clock - (self.idle_since or 0.0)
        return late_units(units, rates, waited=waited, patience=self.patience)

    def _draw_store_seconds(self, name: str, loads: Sequence[Load]) -> list[float]:
        """Seconds that each unit waits for the store: latencies, 503s with a pause, bytes."""
        cloud = self.cloud
        rng = np.random.default_rng(derive_seed(self.cluster.seed, "simulate.store", name))
        requests = np.array([load.requests for load in loads])
        size = np.array([load.bytes for load in loads])
        spread = math.exp(cloud.request_sigma**2 / 2)
        deviation = spread * math.sqrt(math.expm1(cloud.request_sigma**2)) * cloud.request_seconds
        mean = requests * cloud.request_seconds * spread
        # the sum of many latencies is nearly normal
        latencies = np.maximum(mean / 4, rng.normal(mean, np.sqrt(requests) * deviation))
        refused = rng.binomial(np.ceil(requests).astype(int), cloud.refused_share)
        seconds = latencies + refused * cloud.backoff_seconds
        if cloud.request_seconds:
            seconds = seconds + size / cloud.bytes_per_second
        values: list[float] = seconds.tolist()
        return values

    def _at(self, time: float, handle: Callable[[Any], None], argument: Any) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), handle, argument))
