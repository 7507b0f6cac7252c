"""The numbers of the last iteration at an address that Prometheus reads: `http://127.0.0.1:9464/metrics`.

Every number of the line in `stats.jsonl` is a gauge `adascope_fast_NAME`, what each process tells is
`adascope_fast_rank_NAME` with the label `rank`, and seconds have the label `part`. prometheus_client serves them; there
is no token, since Prometheus asks without one, so the address is loopback unless another is named.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from adascope_fast.config import Config, ConfigError
from adascope_fast.config.sections import address_of

PREFIX = "adascope_fast_"


class Prometheus:
    """The server; without `log.prometheus`, nothing."""

    def __init__(self, config: Config) -> None:
        self._address = config.log.prometheus
        self._record: Mapping[str, Any] = {}
        self._about = {"model": config.model.name, "folder": config.run.folder}
        self._server: Any = None

    def start(self) -> None:
        """Answer from now on; of several processes the first does. ConfigError where the address cannot be had."""
        if self._address is None:
            return
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.registry import Collector

        class Last(Collector):
            """Asks for what is told at the moment."""

            def collect(self) -> Iterator[Any]:
                return families()

        families, registry = self._families, CollectorRegistry()
        registry.register(Last())
        host, port = address_of(self._address)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(
                f"log.prometheus must be an address that this machine can serve, got {self._address!r} "
                f"({error.strerror or error}); choose another port, or remove it"
            ) from None

    @property
    def port(self) -> int:
        """That it answers on."""
        return self._server.server_port

    def log(self, record: Mapping[str, Any]) -> None:
        """Tell this iteration from now on."""
        self._record = record

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    def _families(self) -> Iterator[Any]:
        from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily

        record = self._record
        yield InfoMetricFamily(f"{PREFIX}run", "The run that is told of.", value=self._about)
        for name, value in record.items():
            if _is_number(value):
                yield GaugeMetricFamily(_named(name), f"{name} of the last iteration.", value=value)
            elif name in ("seconds", "reward_parts"):
                family = GaugeMetricFamily(_named(name), f"{name} of the last iteration.", labels=["part"])
                for part, number in value.items():
                    family.add_metric([part], number)
                yield family
        ranks = record.get("ranks", [])
        for name, value in ranks[0].items() if ranks else ():
            labels = ["rank"] if _is_number(value) else ["rank", "part"]
            family = GaugeMetricFamily(_named(f"rank_{name}"), f"{name} of a process.", labels=labels)
            for rank, told in enumerate(ranks):
                if _is_number(value):
                    family.add_metric([str(rank)], told[name])
                    continue
                for part, number in told[name].items():
                    family.add_metric([str(rank), part], number)
            yield family


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _named(name: str) -> str:
    return PREFIX + re.sub(r"\W", "_", name)
