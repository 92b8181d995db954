"""Load a model into an engine, and generate offline."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fptq_runtime import __version__
from fptq_runtime.artifact.files import MANIFEST
from fptq_runtime.artifact.io import GOLDEN, check_files, hash_file, is_artifact
from fptq_runtime.config import Activations, EngineConfig
from fptq_runtime.engine.adapters import Adapters
from fptq_runtime.engine.block_store import KVDisk
from fptq_runtime.engine.draft_model import check_draft
from fptq_runtime.engine.engine import Engine, QueueFullError
from fptq_runtime.engine.output import RequestOutput, TokenLogprobs
from fptq_runtime.engine.request import ANYONE, MAX_N, FinishReason, SamplingParams
from fptq_runtime.engine.sizing import cache_tokens, check_memory, device_cache_memory, format_bytes, step_limits
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Backend, StepInput
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.memory import available_memory, give_back_freed_memory
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.gate import Golden, check_artifact, probe
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.lora import check_base
from fptq_runtime.models.tokenizer import Tokenizer, eos_token_ids

logger = logging.getLogger(__name__)

KV_CACHE_DISK_SIZE = 10 << 30
GPU_BATCHED_TOKENS = 8192  # in a step: of fewer, a GPU's prompts cost their launches
SMALLEST_CONTEXT = 1024  # up to it, a GPU's steps are alike

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """One generated sequence. logprobs and prompt_logprobs are empty unless asked for."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]


class LLM:
    """Offline generation: `LLM("artifact").generate(["Once upon a time"], SamplingParams(max_tokens=64))`.

    path: a model directory, quantized or float. device: "cpu", "cuda", or the GPU where there is one. activations:
    "int8" quantizes, per token, what layers with integer weights and float activations read. Options are threads,
    EngineConfig's fields and, for a GPU, gpu_memory_utilization.
    """

    def __init__(self, path: str | Path, *, backend: str = "auto", device: str = "auto",
                 activations: Activations = "checkpoint", **options: Any) -> None:
        self.engine = load_engine(path, backend=backend, device=device, activations=activations, **options)
        self._request_ids = map(str, itertools.count())

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None,
                 adapter: str | Sequence[str] = "") -> list[list[Completion]]:
        """Completions of every prompt (text or token ids), params.n of each, in the prompts' order.

        params, adapter: one for all, or one for each. Raises RequestError before anything runs where a prompt cannot.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list; put the one prompt into a list")
        each = [params or SamplingParams()] * len(prompts) if params is None or isinstance(params, SamplingParams) \
            else list(params)
        if len(each) != len(prompts):
            raise FptqError(f"{len(prompts)} prompts but {len(each)} params; give one for all or one for each",
                            "params")
        token_ids = [self.engine.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        for ids, param in zip(token_ids, each, strict=True):
            self.engine.validate(ids, param)
        adapters = [adapter] * len(prompts) if isinstance(adapter, str) else list(adapter)
        if len(adapters) != len(prompts):
            raise FptqError(f"{len(prompts)} prompts but {len(adapters)} adapters; give one for all or one for each",
                            "adapter")
        numbers = itertools.islice(self._request_ids, len(prompts))
        requests = list(zip(numbers, token_ids, each, [ANYONE] * len(prompts), adapters, strict=True))
        pending = deque(requests)
        events: dict[tuple[str, int], list[RequestOutput]] = {
            (request_id, k): [] for request_id, _, param, *_ in requests for k in range(param.n)
        }
        try:
            while pending or self.engine.has_unfinished_requests:
                try:
                    while pending:
                        self.engine.add_request(*pending[0])
                        pending.popleft()
                except QueueFullError:
                    pass  # the step below makes room
                for output in self.engine.step()[0]:
                    if (key := (output.request_id, output.index)) in events:  # not what an interrupted call left
                        events[key].append(output)
        finally:
            for request_id, *_ in requests:
                self.engine.abort(request_id)
        return [
            [_completion(ids, events[request_id, k]) for k in range(param.n)]
            for request_id, ids, param, *_ in requests
        ]


def load_engine(path: str | Path, *, backend: str | Backend = "auto", device: str = "auto",
                activations: Activations = "checkpoint", threads: int = 0, max_model_len: int | None = None,
                kv_cache_memory: int | None = None, gpu_memory_utilization: float = 0.9,
                chat_template: str | None = None, verify_weights: bool = False, kv_cache_disk: Path | None = None,
                kv_cache_disk_size: int = KV_CACHE_DISK_SIZE, max_num_batched_tokens: int | None = None,
                lora: Mapping[str, Path] | None = None, draft: Path | None = None, **options: Any
                ) -> Engine[Tokenizer]:
    """An engine for a model directory; an artifact's files and golden values are checked first, of these what
    activations that are not its own leave as it was.

    backend: its name, or what `select_backend` gave for a device and so many threads. threads: 0 means what
    the machine, its affinity mask and its cgroup quota allow. max_model_len: the model's own unless given, or what the
    KV cache holds where that is less. kv_cache_memory: EngineConfig's default unless given; on a GPU, what the weights
    and a step leave of the gpu_memory_utilization share of its free memory. chat_template: in place of the model's.
    verify_weights: an artifact's hashes are checked also where they were before and nothing seems to have changed.
    draft: the directory of a smaller model with the same tokenizer, which guesses what comes next.
    lora: PEFT adapters that requests may name; max_loras is at least as many.
    kv_cache_disk: a directory in which cached prefixes outlive the engine, kv_cache_disk_size bytes at most.
    max_num_batched_tokens: EngineConfig's default unless given; on a GPU 8192.
    options: the other fields of EngineConfig. Raises FptqError (ArtifactError, CheckpointError, GateError, …).
    """
    manifest = check_files(Path(path), verify_weights) if is_artifact(Path(path)) else None
    checkpoint = Checkpoint(path, activations)
    model = checkpoint.model_config
    if not 0 < gpu_memory_utilization <= 1:
        raise FptqError(f"gpu_memory_utilization must be above 0 and at most 1, not {gpu_memory_utilization}",
                        "gpu_memory_utilization")
    kernels = select_backend(backend, threads, checkpoint.linear_schemes, device) if isinstance(backend, str) \
        else backend
    free = kernels.free_memory()
    most = EngineConfig.kv_cache_memory if free is None else int(free * gpu_memory_utilization)
    tokens = EngineConfig.max_num_batched_tokens if free is None else GPU_BATCHED_TOKENS
    options["max_loras"] = max(options.get("max_loras", 0), len(lora or {}))
    config = EngineConfig(max_model_len=max_model_len or model.max_position_embeddings,
                          max_num_batched_tokens=max_num_batched_tokens or tokens,
                          kv_cache_memory=most if kv_cache_memory is None else kv_cache_memory, **options)
    small = None if draft is None else Checkpoint(draft)
    token_bytes = sum(kernels.token_bytes(each.model_config, config.kv_cache_dtype)
                      for each in (checkpoint, small) if each is not None)
    config = _fit(config, token_bytes) if max_model_len is None else config
    bases = checkpoint.bases if config.max_loras else {}
    if config.max_loras and manifest is not None:
        check_base(Path(path), manifest, bases)
    limits = step_limits(model, config, token_bytes)  # says what is wrong with it before minutes of loading
    if free is None:
        weights = sum(weight_bytes(Path(each)) for each in (path, draft) if each is not None)
        check_memory(weights, config.kv_cache_memory, limits.num_states * model.state_bytes, available_memory())
    prompt = None if manifest is None or manifest.format_version > 1 else manifest.golden.get("prompt_token_ids")
    checkpoint.max_positions = min(model.max_position_embeddings,
                                   max(config.max_model_len, len(prompt) if isinstance(prompt, list) else 0))
    with ThreadPoolExecutor(1) as executor:
        tokenizer = executor.submit(Tokenizer, path, chat_template)  # half a second for a large vocabulary
        decoder = load_model(checkpoint, kernels)
        if manifest is None:
            if checkpoint.quantized:
                logger.warning("%s has no %s: neither its files nor its logits were checked", path, MANIFEST)
        elif activations == "checkpoint":
            ratio = check_artifact(Path(path), manifest, decoder, kernels, checkpoint.max_positions,
                                   config.kv_cache_dtype)
            if ratio is not None:
                logger.info("golden values agree: at most %.2f of what is tolerated", ratio)
        else:
            logger.warning("golden values of linear layers were not checked: they hold for float activations, and %s "
                           "were asked for", activations)
            if manifest.format_version > 1:
                check_artifact(Path(path), manifest, decoder, kernels, checkpoint.max_positions, config.kv_cache_dtype,
                               ("stem", "norm", "rope", "attention", "order"))
    guessing = None
    if draft is not None and small is not None:
        check_draft(tokenizer.result(), model, Tokenizer(draft), small.model_config)
        guessing = _load_draft(draft, small, kernels, config)
    beyond = [token_id for token_id in tokenizer.result().added_tokens if token_id >= model.vocab_size]
    if beyond:
        logger.warning("%s: the tokenizer has tokens up to %d, but the model's vocabulary only %d tokens: prompts that "
                       "hold one of the others are refused", path, max(beyond), model.vocab_size)
    give_back_freed_memory()  # of reading a large vocabulary
    if free is not None and kv_cache_memory is None:
        now = kernels.free_memory()
        assert now is not None
        memory = device_cache_memory(free, now, gpu_memory_utilization, kernels.step_bytes(model, limits))
        config = replace(config, kv_cache_memory=memory)
        config = _fit(config, token_bytes) if max_model_len is None else config
    probes: Callable[[], Iterator[float]] | None = None
    if manifest is not None and manifest.format_version > 1 and activations == "checkpoint":
        golden, kv_dtype = Golden.read(Path(path) / GOLDEN), config.kv_cache_dtype
        probes = lambda: (outcome.deviation for outcome in probe(  # noqa: E731
            decoder, kernels, golden, checkpoint.max_positions, kv_dtype))
    disk = None
    if kv_cache_disk is not None:
        files = [(file.name, hash_file(file)) for file in sorted(Path(path).iterdir()) if file.is_file()] \
            if manifest is None else manifest.digest
        facts = (__version__, files, model, checkpoint.max_positions, activations, config.kv_cache_dtype,
                 config.block_size, kernels.fingerprint)
        disk = KVDisk(kv_cache_disk, kv_cache_disk_size, repr(facts).encode())
    identity = None if manifest is None else {
        "artifact": manifest.digest, "version": __version__, "kernels": kernels.fingerprint, "activations": activations,
        "kv_cache_dtype": config.kv_cache_dtype, "block_size": config.block_size,
        "max_model_len": config.max_model_len, "close_structured": config.close_structured}
    adapters = None
    if config.max_loras:
        adapters = Adapters(checkpoint.model, decoder, kernels, config.max_loras, bases)
        for name, directory in (lora or {}).items():
            adapters.load(name, directory)
    try:
        engine = Engine(decoder, kernels, config, tokenizer.result(),
                        eos_token_ids(Path(path), model.eos_token_ids, tokenizer.result(), model.vocab_size), probes,
                        disk, adapters, guessing, identity)
    except MemoryError:
        raise FptqError(f"a KV cache of {format_bytes(config.kv_cache_memory)} does not fit into this machine's "
                        "memory; lower kv_cache_memory", "kv_cache_memory") from None
    if free is not None:
        _warm_up(engine)
        for step in _sizes(config):
            engine.executor.step(step, reuse=True)
    return engine


def _load_draft(path: Path, checkpoint: Checkpoint, kernels: Backend, config: EngineConfig) -> Decoder:
    checkpoint.max_positions = min(checkpoint.model_config.max_position_embeddings, config.max_model_len)
    decoder = load_model(checkpoint, kernels)
    if is_artifact(path) and (manifest := check_files(path)).format_version > 1:
        check_artifact(path, manifest, decoder, kernels, checkpoint.max_positions, config.kv_cache_dtype)
    return decoder


def weight_bytes(path: Path) -> int:
    """Of a model directory's weights, as they are stored."""
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".gguf"))


def _warm_up(engine: Engine[Any]) -> None:
    """A GPU's kernels are compiled when first launched, and which they are depends on a step's size: prompts and
    batches of every power of two, each of which then decodes, before anyone waits for them."""
    config, vocab_size = engine.config, engine.model_config.vocab_size
    longest = max(1, min(config.max_num_batched_tokens, config.max_model_len - 2))
    sizes = [1 << i for i in range(max(longest, MAX_N).bit_length())]
    prompts = [*(size for size in sizes if size < longest), longest]
    sent = [([number % vocab_size] * length, 1) for number, length in enumerate(prompts)]  # none has another's prefix
    sent += [([0], size) for size in sizes if 1 < size <= min(config.max_num_seqs, MAX_N)]
    for token_ids, n in sent:
        params = SamplingParams(n=n, max_tokens=min(2, config.max_model_len - len(token_ids)), ignore_eos=True,
                                top_p=0.9, logprobs=1)
        engine.add_request("warm-up", token_ids, params)
        while engine.has_unfinished_requests:
            engine.step()
    engine.forget_pace()


def _sizes(config: EngineConfig) -> Iterator[StepInput]:
    """Steps that write nothing, for a GPU's graphs are captured when their size is first met: of each power of two of a
    context, the longest first, whose memory serves the others, each batch that decodes, and one sequence that does
    beside a chunk of a prompt."""
    most = min(config.max_num_seqs, config.max_num_batched_tokens)
    bits = (max(config.max_model_len, SMALLEST_CONTEXT) - 1).bit_length()
    for size in [1 << i for i in range(bits, SMALLEST_CONTEXT.bit_length() - 2, -1)]:
        context = min(size, config.max_model_len)
        for seqs in sorted({1, 2, 4, *range(8, most, 8), most}, reverse=True):
            if seqs <= most:
                yield _unwritten([1] * seqs, context, config.block_size)
        if most > 1:
            for chunk in {min(length, config.max_num_batched_tokens - 1) for length in (min(64, context), context)}:
                yield _unwritten([1, chunk], context, config.block_size)


def _unwritten(rows: list[int], context: int, block_size: int) -> StepInput:
    """The last rows of sequences with so many tokens, in no slot."""
    ends = np.cumsum([0, *rows], dtype=np.int32)
    positions = np.concatenate([np.arange(context - count, context, dtype=np.int32) for count in rows])
    return StepInput(
        token_ids=np.zeros(ends[-1], np.int32), positions=positions, slot_mapping=np.full(ends[-1], -1, np.int32),
        query_start_loc=ends, seq_lens=np.full(len(rows), context, np.int32),
        block_tables=np.zeros((len(rows), -(-context // block_size)), np.int32), logits_rows=ends[1:] - 1,
        state_slots=np.arange(len(rows), dtype=np.int32))


def _fit(config: EngineConfig, token_bytes: int) -> EngineConfig:
    """Lower max_model_len to what the KV cache holds."""
    tokens = cache_tokens(token_bytes, config.block_size, config.kv_cache_memory)
    if not 0 < tokens < config.max_model_len:
        return config
    logger.warning("the model's context of %d tokens is lowered to %d, what a KV cache of %s holds; raise "
                   "kv_cache_memory (--kv-cache-memory) for more", config.max_model_len, tokens,
                   format_bytes(config.kv_cache_memory))
    return replace(config, max_model_len=tokens)


def _completion(prompt_token_ids: list[int], events: list[RequestOutput]) -> Completion:
    last = events[-1]
    assert last.finish_reason is not None
    return Completion(
        prompt_token_ids=tuple(prompt_token_ids),
        token_ids=tuple(token_id for event in events for token_id in event.token_ids),
        text="".join(event.text for event in events),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=tuple(entry for event in events for entry in event.logprobs),
        prompt_logprobs=next((event.prompt_logprobs for event in events if event.prompt_logprobs), ()),
    )
