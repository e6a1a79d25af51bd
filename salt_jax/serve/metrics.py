"""What a server counts, in Prometheus' form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.viewers = Gauge("salt_viewers", "Viewers, those who are away too", registry=registry)
        self.waiting = Gauge("salt_waiting", "Viewers who wait for a slot", registry=registry)
        self.frames = Counter("salt_frames", "Frames made", registry=registry)
        self.dropped = Counter(
            "salt_dropped_chunks", "Chunks that a slow viewer did not get", registry=registry
        )
        self.seconds = Histogram(
            "salt_seconds",
            "Time that the generator waits for a part",
            ["part"],
            buckets=SECONDS,
            registry=registry,
        )
