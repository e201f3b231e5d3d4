"""vLLM engine that samples from the student, with changing weights, or from the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from actors import weight_sync
from seqkd.config.resources import EngineConfig
from seqkd.imports import importing
from seqkd.types import Prompt, Rollout, Source, WeightVersion


class RolloutActor:
    """Sampler of completions with the log-probability of each sampled token."""

    def __init__(self, stop_ids: tuple[int, ...], source: Source) -> None:
        self.stop_ids = list(stop_ids)
        self.source: Source = source
        self.policy_version = 0

    def start(self, model: str, engine: EngineConfig, max_model_len: int) -> None:
        """Build the engine. This is separate from the constructor so that a failure keeps its
        cause."""
        self.llm = build_engine(model, engine, max_model_len)

    def sample(
        self,
        prompts: list[Prompt],
        seeds: list[int],
        samples: list[int],
        max_tokens: int,
        temperature: float,
        top_p: float,
    ) -> Iterator[tuple[int, int, Rollout]]:
        """Yield ``samples[i]`` completions per prompt i as (i, index, completion), each as soon as
        it is finished. ``seeds[i]`` determines the samples."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.llm.reset_prefix_cache()  # the result must not depend on earlier calls
        engine = self.llm.llm_engine
        asked = [(place, index) for place, number in enumerate(samples) for index in range(number)]
        for request, (place, index) in enumerate(asked):
            params = SamplingParams(
                seed=seeds[place] + index,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                stop_token_ids=self.stop_ids,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = {"prompt_token_ids": list(prompts[place].token_ids)}
            engine.add_request(str(request), prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                place, index = asked[int(output.request_id)]
                (completion,) = output.outputs
                yield place, index, self._rollout(prompts[place], seeds[place], index, completion)

    def _rollout(self, prompt: Prompt, seed: int, index: int, completion: Any) -> Rollout:
        tokens = tuple(completion.token_ids)
        logprobs = tuple(
            at[token].logprob for at, token in zip(completion.logprobs, tokens, strict=True)
        )
        return Rollout(
            prompt_id=prompt.prompt_id,
            sample_id=f"{prompt.prompt_id}/{self.source}/{seed:08x}/{index}",
            prompt_ids=prompt.token_ids,
            completion_ids=tokens,
            rollout_logprobs=logprobs,
            source=self.source,
            policy_version=self.policy_version,
            finish_reason="length" if completion.finish_reason == "length" else "stop",
            tag=prompt.tag,
        )

    def node(self) -> str:
        """Return the id of this engine's Ray node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def load(self, version: WeightVersion, data: bytes | None) -> None:
        """Load published weights."""
        weight_sync.load(self.llm, version, data)
        self.policy_version = version.policy_version

    def logprobs(self, token_ids: list[int]) -> list[float]:
        """Return the log-probs of ``token_ids[1:]``, each given the tokens before it. vLLM does not
        use its prefix cache for prompt log-probs."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": token_ids}], params, use_tqdm=False)
        return [
            at[token].logprob
            for at, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        ]


def build_engine(model: str, engine: EngineConfig, max_model_len: int, **options: Any) -> Any:
    """Return a vLLM engine without a tokenizer. ``options`` are passed to ``vllm.LLM``."""
    with importing(freeze=True):
        from vllm import LLM

    memory: dict[str, Any] = (
        {"gpu_memory_utilization": engine.gpu_memory_utilization}
        if engine.gpus
        else {"kv_cache_memory_bytes": int(engine.kv_cache_gib * 2**30)}
    )
    defaults: dict[str, Any] = {
        "dtype": engine.precision,
        "max_model_len": max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": engine.eager,
        "tensor_parallel_size": engine.tensor_parallel_size,
        # Within a placement group vLLM would choose Ray and request another bundle per GPU.
        "distributed_executor_backend": "mp" if engine.tensor_parallel_size > 1 else None,
        "skip_tokenizer_init": True,
        # A checkpoint's own sampling defaults (top-p, penalties) would change the distribution.
        "generation_config": "vllm",
        # Log-probs under the sampling distribution, after temperature and top-p.
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "actors.weight_sync.VerifiedReload",
        "trust_remote_code": False,
        "load_format": "safetensors",
        "disable_log_stats": True,
    }
    return LLM(model, **(defaults | memory | options))
