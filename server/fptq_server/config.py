"""What the server is told at start: frozen, pure data."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fptq_runtime.config import Pooling
from fptq_runtime.errors import FptqError
from fptq_server.keys import check_key
from fptq_server.logs import LogFormat
from fptq_server.parsers import REASONING_FORMATS, TOOL_PARSERS

MetricsAliases = Literal["none", "vllm"]
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")


@dataclass(frozen=True)
class ServerConfig:
    """Sizes in bytes, times in seconds.

    api_keys, api_keys_file: any one of them opens every endpoint; with none the server is open. keys.py has their
    form.
    admin_port: of host, for what an operator does, who has the admin_key.
    uds: a socket file, instead of host and port. ssl_certfile and ssl_keyfile: PEM; with them the server speaks TLS.
    root_path: where a proxy puts the server, as /llm. cors_origins: what pages may call it from, or "*".
    chat_template_kwargs: variables of the chat template, where a request does not give them.
    public_metrics: /metrics answers without a key. page: / is one to chat on and to watch the server by.
    metrics_aliases: Metrics'.
    stall_timeout: /livez fails when the engine has work and finished no step for this long.
    scrub_interval: in which the artifact's files are read and hashed once, again and again; 0: never.
    head_timeout: from a connection's or a request's first byte to the end of its headers.
    tool_call_parser, reasoning_parser: ChatFormat's. responses_db: ResponseStore's file.
    allow_runtime_lora_updating: clients may load adapters from this machine's directories, and drop them.
    batch_dir, batch_dir_size: BatchStore's. max_file_bytes: of a file for a batch.
    write_timeout: in which a client must read some of what waits for it.
    body_timeout: from one byte of a body to the next, and for a short one in all; RequestLimits gives long ones more.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    root_path: str = ""
    cors_origins: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    api_keys_file: Path | None = None
    admin_port: int | None = None
    admin_key: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    public_metrics: bool = False
    page: bool = True
    metrics_aliases: MetricsAliases = "none"
    log_format: LogFormat = "text"
    drain_timeout: float = 30.0
    stall_timeout: float = 60.0
    scrub_interval: float = 3600.0
    keep_alive_interval: float = 15.0
    head_timeout: float = 20.0
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    max_body_bytes: int = 16 << 20
    max_file_bytes: int = 200 << 20
    max_header_bytes: int = 64 << 10
    max_prompts: int = 1024
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    responses_db: Path | None = None
    allow_runtime_lora_updating: bool = False
    batch_dir: Path | None = None
    batch_dir_size: int = 1 << 30

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise FptqError(f"port must be between 0 and 65535, not {self.port}", "port")
        if self.admin_port is not None and not 0 <= self.admin_port <= 65535:
            raise FptqError(f"admin_port must be between 0 and 65535, not {self.admin_port}", "admin_port")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise FptqError("ssl_keyfile needs ssl_certfile", "ssl_keyfile", "ssl_certfile")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise FptqError(f"root_path must be a path such as /llm, not {self.root_path}", "root_path")
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise FptqError(f"cors_origins must be like https://example.com:8080, or *, not {origin!r}",
                                "cors_origins")
        for key in (*self.api_keys, *([] if self.admin_key is None else [self.admin_key])):
            check_key(key)
        for name in ("drain_timeout", "scrub_interval"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise FptqError(f"{name} must be 0 or more seconds, not {getattr(self, name)}", name)
        for name in ("stall_timeout", "keep_alive_interval", "head_timeout", "body_timeout", "write_timeout",
                     "max_body_bytes", "max_file_bytes", "max_header_bytes", "max_prompts"):
            if getattr(self, name) <= 0:
                raise FptqError(f"{name} must be more than 0, not {getattr(self, name)}", name)
        for field_name, formats in (("tool_call_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_FORMATS)):
            known = ["auto", "none", *sorted(form.name for form in formats)]
            if getattr(self, field_name) not in known:
                raise FptqError(f"there is no {field_name} {getattr(self, field_name)}; there are {', '.join(known)}",
                                field_name)


@dataclass(frozen=True)
class ModelCard:
    """The served model, as clients see it.

    aliases: further names that clients may call it by. adapters: of those that are loaded, a name each, as it is at
    the time. created: Unix seconds. description, engine and kernels are
    reported as they are: what the model is, the engine's limits, and which kernel runs each kind of layer. layers: the
    scheme, the kernel and the error of each, where the artifact says. sampling:
    what a request gets that does not say otherwise, under SamplingParams' names. pooling: of embeddings; no_embeddings:
    why there are none; no_scores: why texts are not compared.
    """

    id: str
    created: int
    max_model_len: int
    vocab_size: int
    description: Mapping[str, object] = field(default_factory=dict)
    engine: Mapping[str, object] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)
    layers: Sequence[Mapping[str, object]] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    pooling: Pooling = "last"
    no_embeddings: str | None = None
    no_scores: str | None = None
    adapters: Collection[str] = ()
