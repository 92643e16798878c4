"""A stand-in for vLLM's LLM that records its calls."""

from __future__ import annotations

from types import SimpleNamespace


class FakeWorker:
    def __init__(self, calls, reloads: bool):
        self.model_runner = SimpleNamespace(
            model=SimpleNamespace(load_weights=lambda w: calls.append(("load", dict(w))))
        )
        if reloads:
            self.reload_weights = self.model_runner.reload_weights = lambda weights_iterator=None: None


class FakeEngine:
    """Queues requests and answers all of them in one step."""

    def __init__(self, llm, worker):
        self.llm, self.queue, self.hangs = llm, {}, False
        self.model_executor = SimpleNamespace(driver_worker=worker)

    def add_request(self, name, prompt, params):
        self.queue[name] = (prompt["prompt_token_ids"], params)

    def has_unfinished_requests(self):
        return bool(self.queue)

    def step(self):
        if self.hangs:
            return []
        self.llm.calls.append(("generate", len(self.queue)))
        self.llm.params = [params for _, params in self.queue.values()]
        outputs = [self.llm.answer(name, *request) for name, request in self.queue.items()]
        self.queue = {}
        return outputs

    def abort_request(self, names):
        self.llm.calls.append(("abort", len(names)))
        self.queue = {name: request for name, request in self.queue.items() if name not in names}


class FakeLLM:
    """Answers each request with its prompt's length in tokens, all of log-prob -0.5."""

    def __init__(self, *, reloads: bool = True, versions: bool = True, **arguments):
        self.calls, self.arguments = [], arguments
        worker = FakeWorker(self.calls, reloads)
        self.llm_engine = FakeEngine(self, worker)
        self.weight_version, self.emptied = "default", True
        self.logprobs = iter(())
        self.writes, self.reason = [], "length"
        if versions:
            self.update_weight_version = self._update_weight_version

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, dict(kwargs["weights_iterator"])))

    def _update_weight_version(self, version):
        self.calls.append(("version", version))
        self.weight_version = version

    def reset_prefix_cache(self):
        self.calls.append(("reset",))
        return self.emptied

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def wake_up(self):
        self.calls.append(("wake",))

    def get_metrics(self):
        return [
            SimpleNamespace(name="vllm:kv_cache_usage_perc", value=0.25),
            SimpleNamespace(name="vllm:other", value=7),
        ]

    def answer(self, name, ids, params):
        def sample():
            tokens = self.writes or [7] * len(ids)
            found = [{token: SimpleNamespace(logprob=next(self.logprobs, -0.5))} for token in tokens]
            spans, reason = [SimpleNamespace(version=self.weight_version)], self.reason
            return SimpleNamespace(token_ids=tokens, logprobs=found, finish_reason=reason, weight_versions=spans)

        outputs = [sample() for _ in range(params.n)]
        return SimpleNamespace(request_id=name, outputs=outputs, finished=True)
