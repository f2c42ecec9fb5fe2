"""What /metrics tells, in Prometheus' text format or OpenMetrics'."""

import os

from prometheus_client import CollectorRegistry, Counter, Histogram, exposition
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

COUNTED = "PROMETHEUS_MULTIPROC_DIR"  # the folder where several processes count together, which the library looks for
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Meters:
  """Counts of the HTTP side, and the service's and its passes' as they stand when asked. Where the environment has
  COUNTED, the library counts in files there, for all processes together."""

  def __init__(self, service, passes):
    self.registry, self.service, self.passes = CollectorRegistry(), service, passes
    more = {"registry": self.registry}
    self.answers = Counter("arrol_requests", "Calls answered, by HTTP status; 499: the client left", ["status"], **more)
    self.first = Histogram("arrol_first_token_seconds", "From a call to its first token", buckets=_SECONDS, **more)
    self.token = Histogram("arrol_token_seconds", "Mean time between a trace's tokens after its first", buckets=_TOKEN_SECONDS,
                           **more)
    self.queue = Histogram("arrol_queue_seconds", "From a call to a trace's slot", buckets=_SECONDS, **more)
    self.total = Histogram("arrol_request_seconds", "From a call to its last token", buckets=_SECONDS, **more)
    self.vote = Histogram("arrol_vote_seconds", "What a vote took after the last token", buckets=_SECONDS, **more)
    if COUNTED in os.environ:
      self.answers.labels(200)  # its file is made now: whatever becomes of the folder, counting goes on
    service.on_queue = self.queue.observe
    self.registry.register(self)

  def collect(self):
    s, t = self.service, self.service.standing.totals
    yield GaugeMetricFamily("arrol_traces_running", "Traces in slots", value=s.running)
    yield GaugeMetricFamily("arrol_traces_waiting", "Traces without a slot", value=s.waiting)
    yield GaugeMetricFamily("arrol_traces_scoring", "Traces of calls that want a second pass or a vote and have no answer yet",
                            value=self.passes.taken)
    yield GaugeMetricFamily("arrol_traces_most", "Traces that may run or wait, and that may be scored", value=s.most)
    yield GaugeMetricFamily("arrol_still_seconds", "Since the engine's last step; 0 where there is nothing to do", value=s.still)
    yield CounterMetricFamily("arrol_prompt_tokens", "Prompt tokens taken", value=t.prompt_tokens)
    yield CounterMetricFamily("arrol_tokens", "Tokens generated", value=t.tokens)
    yield CounterMetricFamily("arrol_traces", "Traces finished", value=t.traces)
    yield CounterMetricFamily("arrol_traces_hopeless", "Traces that the quality head stopped", value=t.hopeless)
    yield CounterMetricFamily("arrol_traces_cancelled", "Traces whose client left", value=t.cancelled)
    asked, found, used, size = s.standing.prefixes
    yield CounterMetricFamily("arrol_prefix_cache_queries", "Prompt tokens looked up", value=asked)
    yield CounterMetricFamily("arrol_prefix_cache_hits", "Prompt tokens that were there and not prefilled again", value=found)
    yield GaugeMetricFamily("arrol_prefix_cache_hit_rate", "Hits by queries since the start",
                            value=found / asked if asked else 0.0)
    yield GaugeMetricFamily("arrol_prefix_cache_usage", "Share of the kept blocks' places that is taken", value=used / size)

  def text(self, accept: str) -> tuple[bytes, str]:
    """The page and its content type, in the format that a scraper accepts."""
    encode, kind = exposition.choose_encoder(accept)
    registry = self.registry
    if os.path.isdir(os.environ.get(COUNTED, "")):  # else of this process alone: somebody has removed it
      registry = CollectorRegistry()
      MultiProcessCollector(registry)
      registry.register(self)
    return encode(registry), kind
