"""The `fptq` command. Each command imports what it needs when it runs, so that help and errors come at once."""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from click.core import ParameterSource

import fptq_runtime
from fptq_runtime.config import MAX_LORAS, MAX_THREADS
from fptq_runtime.errors import FptqError

if TYPE_CHECKING:
    from fptq_server.settings import Kind

Answer = tuple[dict[str, Any], str]  # for --json, and for people
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Value = TypeVar("_Value", int, float)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
PROTOCOL_RECIPES = ("smoothquant", "fptq", "fptq-best")  # what papers have figures of
EXTRAS = {"ray": "ray", "torch": "quantize", "transformers": "quantize"}  # what brings a package that serving needs not
_ORIGINS = "fptq.origins"  # key of Context.meta: where a parameter's value comes from, where that is no flag


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exit code 0, 1 (an error), 2 (wrong usage), 130 (interrupted) or 143 (told to stop); errors are
    one line."""
    if threading.current_thread() is threading.main_thread():
        # From the first moment on: as a container's first process, SIGTERM is lost on whoever has no handler for it.
        signal.signal(signal.SIGTERM, _stop)
        if list(sys.argv[1:] if arguments is None else arguments)[:1] == ["serve"]:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # it waits until the server can do what it asks
    try:
        code = cli.main(arguments, prog_name="fptq", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "fptq"
        _fail(f"{_one_line(error.format_message()).rstrip('.')} (see `{path} --help`)", 2)
    except click.ClickException as error:
        _fail(_one_line(error.format_message()), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FPTQ_DEBUG") == "1":
            raise
        _fail(_describe(error), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _fail(message: str, code: int) -> None:
    click.echo(f"fptq: {message}", err=True)
    sys.exit(code)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"this needs {error.name}, which is not installed: pip install 'fptq-serve[{EXTRAS[error.name]}]'"
    if isinstance(error, (FptqError, OSError)):
        return _one_line(str(error))
    return _one_line(f"internal error: {type(error).__name__}: {error} (FPTQ_DEBUG=1 shows where)")


def _one_line(text: str) -> str:
    return " ".join(text.split())


class Integer(click.IntRange):
    name = "integer"  # as errors and help have it; click's own is no word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return _within(self, click.types.IntParamType.convert(self, value, param, ctx), param, ctx)  # type: ignore[arg-type]


class Number(click.FloatRange):
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return _within(self, click.types.FloatParamType.convert(self, value, param, ctx), param, ctx)  # type: ignore[arg-type]


def _within(wanted: click.IntRange | click.FloatRange, number: _Value, param: click.Parameter | None,
            ctx: click.Context | None) -> _Value:
    low, high = wanted.min, wanted.max
    below = low is not None and (number <= low if wanted.min_open else number < low)
    if not below and (high is None or number <= high):
        return number
    least = f"{'above' if wanted.min_open else 'at least'} {low}"
    bounds = least if high is None else f"at most {high}" if low is None else (
        f"{least} and at most {high}" if wanted.min_open else f"between {low} and {high}")
    wanted.fail(f"{number} is not {bounds}", param, ctx)


class Size(click.ParamType[int]):
    """Bytes, as 512MiB or 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
        if match is None or match[2].upper() not in _UNITS:
            self.fail(f"{value!r} is not a size like 512MiB or 2GiB", param, ctx)
        size = int(float(match[1]) * _UNITS[match[2].upper()])
        if size < 1:
            self.fail(f"{value!r} is less than a byte", param, ctx)
        return size


class ExistingFile(click.ParamType[Path]):
    """A file to read; one of the given words stands for itself."""

    name = "file"

    def __init__(self, *words: str) -> None:
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from fptq_runtime.locate import did_you_mean, expand

        path = expand(value)
        if value in self.words:
            return value
        if path.is_dir():
            self.fail(f"{value} is a directory, not a file", param, ctx)
        if not path.exists():  # a pipe will do
            words = "".join(f" or {word}" for word in self.words)
            self.fail(f"{value} is no file{words}{did_you_mean(path, *self.words, files='*')}", param, ctx)
        return path


class TextFile(ExistingFile):
    """`tales` is the text that comes with fptq and that calibration never sees."""

    def __init__(self) -> None:
        super().__init__("tales")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        return Path(fptq_runtime.__file__).with_name("quantizer") / "data" / "heldout.txt" if path == "tales" else path


class NamedDirectory(click.ParamType[str]):
    """As name=DIR."""

    name = "name=DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from fptq_runtime.locate import did_you_mean, expand

        given, _, directory = value.partition("=")
        if not (given and directory):
            self.fail(f"{value!r} is not like name=DIR", param, ctx)
        path = expand(directory)
        if not path.is_dir():
            self.fail(f"{directory} is no directory{did_you_mean(path)}", param, ctx)
        return f"{given}={path}"


class JsonObject(click.ParamType[dict[str, Any]]):
    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            parsed = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"{value} is not JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value} is not a JSON object", param, ctx)
        return parsed


class RecipeName(click.ParamType[str]):
    """A preset's name, or a YAML file."""

    name = "recipe"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from fptq_runtime.locate import did_you_mean, expand
        from fptq_runtime.quantizer.recipe import PRESETS

        path, presets = expand(value), [preset.name for preset in PRESETS]
        if value in presets:
            return str(value)
        if path.is_dir():
            self.fail(f"{value} is a directory, not a file", param, ctx)
        if not path.exists():
            meant = did_you_mean(path, *presets, files="*.y*ml") or f"; the presets are {', '.join(presets)}"
            self.fail(f"{value} is neither a preset nor a file{meant}", param, ctx)
        return str(path)


class Threads(Integer):
    """0, or at most MAX_THREADS."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        threads = super().convert(value, param, ctx)
        if threads > MAX_THREADS:
            self.fail(f"{threads} is more than this machine's {MAX_THREADS} CPUs", param, ctx)
        return threads


class Percent(click.ParamType[float]):
    """A share, as 0.5%."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*%", value.strip())
        if match is None:
            self.fail(f"{value!r} is not a percentage like 0.5%", param, ctx)
        return float(match[1]) / 100


class RecipeList(click.ParamType[tuple[str, ...]]):
    """Recipes between commas."""

    name = "recipes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = [name.strip() for name in value.split(",") if name.strip()]
        if not names:
            self.fail("give recipes between commas, as rtn,fptq", param, ctx)
        return tuple(RecipeName().convert(name, param, ctx) for name in dict.fromkeys(names))


def answers(command: _Function) -> Any:
    """Add --json to a command that returns (data, text): data is printed with --json, text without."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, all else on stderr.")
    @functools.wraps(command)
    def run(as_json: bool, **options: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            data, text = command(**options)
        click.echo(json.dumps(data) if as_json else text)

    return run


def engine_options(command: _Function) -> _Function:
    for option in reversed([
        click.option("--max-model-len", type=Integer(1), help="Longest prompt and answer together, in tokens "
                     "(the model's own limit)."),
        click.option("--max-num-seqs", type=Integer(1), default=64, show_default=True,
                     help="Most sequences in one step."),
        click.option("--max-num-batched-tokens", type=Integer(1), help="Most tokens in one step (512; on a GPU "
                     "8192)."),
        click.option("--kv-cache-dtype", type=click.Choice(["bf16", "int8"]), default="int8", show_default=True),
        click.option("--kv-cache-memory", type=Size(), help="Memory for keys and values, as 512MiB, which is the "
                     "default on a CPU; on a GPU it is what is free."),
        click.option("--gpu-memory-utilization", type=Number(0, 1, min_open=True), default=0.9,
                     show_default=True, help="Share of a GPU's free memory that weights, cache and steps may take."),
        click.option("--no-prefix-cache", "enable_prefix_caching", is_flag=True, flag_value=False, default=True,
                     help="Compute every prompt from its start."),
        click.option("--kv-cache-disk", type=click.Path(file_okay=False, path_type=Path), help="A directory where "
                     "cached prefixes outlive their place in memory, and the server."),
        click.option("--kv-cache-disk-size", type=Size(), default="10GiB", show_default=True, help="Most that lies "
                     "there; what was used longest ago goes first."),
        click.option("--draft", type=click.Path(file_okay=False, exists=True, path_type=Path), help="A smaller model "
                     "with the same tokenizer, which guesses what comes next; answers stay as they are."),
        click.option("--no-speculation", "speculation", is_flag=True, flag_value=False, default=True,
                     help="Compute one token of each answer in a step, and guess none."),
        click.option("--no-close-structured", "close_structured", is_flag=True, flag_value=False, default=True,
                     help="Let max_tokens cut JSON and other structured answers where they are."),
        activation_option,
        backend_options,
    ]):
        command = option(command)
    return command


def activation_option(command: _Function) -> _Function:
    return click.option("--activations", type=click.Choice(["checkpoint", "int8"]), default="checkpoint",
                        show_default=True, help="int8: per token, for layers with integer weights that the checkpoint "
                        "leaves in float.")(command)


def backend_options(command: _Function) -> _Function:
    for option in reversed([
        click.option("--backend", type=click.Choice(["auto", "native", "reference"]), default="auto",
                     show_default=True, help="native: C++; reference: torch, slow; auto: native where it was built."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
                     help="auto: an NVIDIA GPU where torch and Triton can use one."),
        threads_option,
    ]):
        command = option(command)
    return command


def threads_option(command: _Function) -> _Function:
    return click.option("--threads", type=Threads(), default=0, help="CPU threads that compute; 0: what machine and "
                        "quota allow; at most as many as it has CPUs.")(command)


def text_tokens_option(default: int | None, said: str | bool = True) -> Callable[[_Function], _Function]:
    """Once --max-tokens in some commands, which is the length of an answer in others. said: the default, where it
    depends on others."""
    shown = click.option("--text-tokens", type=Integer(2), default=default, show_default=said,
                         help="Read only the first tokens of the text.")
    old = click.option("--max-tokens", "text_tokens", type=Integer(2), hidden=True)
    return lambda command: old(shown(command))


def configure(ctx: click.Context, _: click.Parameter, file: Path | None) -> None:
    """Variables and the file stand in for defaults; each parameter's type reads them as it reads a flag."""
    from fptq_server.settings import read_settings

    named = settings()
    try:
        given = read_settings({name: _kind(parameter) for name, parameter in named.items()}, file)
    except FptqError as error:
        raise click.UsageError(str(error)) from None
    ctx.default_map = {named[name].name: _switched(named[name], each.value) for name, each in given.items()}
    ctx.meta[_ORIGINS] = {named[name].name: each.origin for name, each in given.items()}


def settings() -> dict[str, click.Parameter]:
    """What `fptq serve` can be told, by names as max_model_len."""
    return {str(each.opts[0]).lstrip("-").replace("-", "_"): each for each in serve.params if each.expose_value}


def _kind(parameter: click.Parameter) -> Kind:
    if getattr(parameter, "is_flag", False):
        return "flag"
    if parameter.multiple or parameter.nargs != 1:
        return "list"
    return "object" if isinstance(parameter.type, JsonObject) else "value"


def _switched(parameter: click.Parameter, value: Any) -> Any:
    """What a flag gives its parameter where it is on or off, or the other way round; --no-prefix-cache is one that
    gives False."""
    return value if getattr(parameter, "flag_value", None) is not False else not value


class Command(click.Command):
    """Its errors name options as they were given: --max-model-len, or FPTQ_MAX_MODEL_LEN, not max_model_len."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param is not None and error.param.name in (origins := _origins(ctx)):
                error.param_hint = [origins[error.param.name]]
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FptqError as error:
            names = {str(option.name): option.opts[0] for option in self.params} | _origins(ctx)
            error.args = (error.spelled(names),)
            raise


def _origins(ctx: click.Context) -> dict[str, str]:
    """Of the values that no flag gave."""
    return {name: origin for name, origin in ctx.meta.get(_ORIGINS, {}).items()
            if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE}


class Commands(click.Group):
    command_class = Command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(fptq_runtime.__version__, prog_name="fptq", message="%(prog)s %(version)s")
def cli() -> None:
    """Quantize a language model to W4A8 and serve it.

    MODEL and ARTIFACT are a directory, a .gguf file, a Hugging Face hub id, or `demo`, the small model that comes with
    fptq.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads spin where they wait, and starve other work


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recipe", type=RecipeName(), default="fptq-best", show_default=True, help="A preset, or a YAML file.")
@click.option("--calibration", type=ExistingFile("self", "chat", "tales", "random"), help="A text file; `self`: "
              "what the model writes; `chat`: that, and conversations with it; `tales`: text that comes with fptq; "
              "`random`: vocabulary tokens (self, where the float model fits the memory, else tales).")
@click.option("--num-samples", type=Integer(1), default=32, show_default=True, help="Calibration samples.")
@click.option("--sample-length", type=Integer(2), help="Tokens of each (512, or the model's context).")
@click.option("--lengths", type=ExistingFile(), help="A request trace or a histogram of lengths (CSV or JSON), which "
              "the samples then have; their tokens stay as many.")
@click.option("--text", type=TextFile(), help="What perplexity is measured on before and after (tales that "
              "calibration never sees).")
@text_tokens_option(8192)
@click.option("--max-loss", type=Percent(), help="What perplexity may rise by, as 0.5%: the linears that cost most get "
              "8 bits, then 16, until it is met.")
@click.option("--extra-bytes", type=Percent(), help="What may be spent on that, as 10% of the artifact; alone, all of "
              "it is spent.")
@click.option("--seed", type=Integer(0), default=0, show_default=True)
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at OUT.")
@threads_option
@answers
def quantize(model: str, out: Path, recipe: str, revision: str | None, max_loss: float | None,
             extra_bytes: float | None, calibration: str | Path | None, num_samples: int, sample_length: int | None,
             lengths: Path | None, seed: int, threads: int, **options: Any) -> Answer:
    """Quantize MODEL into the new directory OUT."""
    from fptq_runtime.locate import find_model

    began = time.monotonic()
    source = find_model(model, revision)
    from fptq_runtime.artifact.io import check_output

    check_output(out, options["overwrite"], Path(source))  # before what takes seconds to import
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages, which large weights fault in fast
    _limit_torch(threads)
    from fptq_runtime.quantizer.pipeline import quantize
    from fptq_runtime.quantizer.report import summarize
    from fptq_runtime.quantizer.samples import Calibration

    options["calibration"] = Calibration(calibration, num_samples, sample_length, lengths, seed)
    with _tells_what_is_left(out):
        if max_loss is None and extra_bytes is None:
            manifest = quantize(source, out, recipe, progress=True, **options)
            return manifest.model_dump(mode="json"), f"{_took(began)}\n{summarize(manifest, model, recipe)}"
        from fptq_runtime.analysis.budget import Budget, quantize_within
        from fptq_runtime.quantizer.recipe import load_recipe

        budget = Budget(max_loss, extra_bytes)
        manifest, spent = quantize_within(source, out, load_recipe(recipe), budget, progress=True, **options)
    return {**manifest.model_dump(mode="json"), "budget": asdict(spent)}, (
        f"{_took(began)}\n{spent.summary(budget)}\n\n{summarize(manifest, model, recipe)}")


def _took(began: float) -> str:
    """began: on the monotonic clock."""
    from fptq_runtime.progress import duration

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # which Linux counts in KiB
    return f"took {duration(time.monotonic() - began)} and at most {peak / 1e9:.1f} GB of memory"


def _limit_torch(threads: int) -> None:
    from fptq_runtime.kernels.reference import limit_threads

    limit_threads(threads)


class Interrupted(click.ClickException):
    exit_code = 130  # as a shell has it after Ctrl-C


@contextlib.contextmanager
def _tells_what_is_left(out: Path) -> Iterator[None]:
    """After Ctrl-C, whether OUT or anything beside it that carries its name was written."""
    def found() -> dict[tuple[str, int, int], str]:
        at = out.resolve()
        paths = [path for path in (at, *at.parent.glob(f".{glob.escape(at.name)}.*")) if path.exists()]
        return {(path.name, path.stat().st_ino, path.stat().st_mtime_ns): path.name for path in paths}

    before = found()
    try:
        yield
    except KeyboardInterrupt:
        written = [name for key, name in found().items() if key not in before]
        raise Interrupted(f"interrupted; {' and '.join(written) or 'nothing'} was written") from None


@cli.command()
@click.argument("artifact", nargs=-1, required=True)
@click.option("--config", type=ExistingFile(), is_eager=True, expose_value=False, callback=configure,
              envvar="FPTQ_CONFIG", help="A YAML file with any of these options, as max-model-len: 4096.")
@click.option("--quantize", "recipe", type=RecipeName(), help="A preset, or a YAML file, by which a float model is "
              "quantized before it is served, once: the artifact is kept in the user's cache.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=Integer(0, 65535), default=8000, show_default=True)
@click.option("--uds", help="Listen on this socket file instead of host and port.", type=click.Path(dir_okay=False))
@click.option("--ssl-certfile", type=click.Path(dir_okay=False), help="PEM, with its chain; the server speaks TLS.")
@click.option("--ssl-keyfile", type=click.Path(dir_okay=False), help="PEM, where --ssl-certfile does not hold the key.")
@click.option("--root-path", default="", help="Where a proxy puts the server, as /llm.")
@click.option("--cors-origins", multiple=True, metavar="ORIGIN", help="Pages that may call the server, as "
              "https://example.com, or *; may be given more than once.")
@click.option("--served-model-name", "model_names", multiple=True, help="The model id that clients send (the "
              "artifact's name); may be given more than once, answers have the first.")
@click.option("--chat-template", type=ExistingFile(), help="A Jinja file, in place of the model's chat template.")
@click.option("--default-chat-template-kwargs", "chat_template_kwargs", type=JsonObject(), default={}, metavar="JSON",
              help="""Variables of the chat template, where a request gives none, as '{"enable_thinking": false}'.""")
@click.option("--generation-config", type=click.Choice(["auto", "none"]), default="auto", show_default=True,
              help="auto: the model's generation_config.json gives the defaults of sampling.")
@click.option("--tool-call-parser", default="auto", show_default=True, metavar="NAME",
              help="The format of the model's tool calls; auto: as its chat template tells, none: as text.")
@click.option("--reasoning-parser", default="auto", show_default=True, metavar="NAME",
              help="The format of the model's reasoning; auto: as its chat template tells, none: as text.")
@click.option("--responses-db", type=click.Path(dir_okay=False, path_type=Path),
              help="Keeps stored responses of /v1/responses in this file, not in memory.")
@click.option("--batch-dir", type=click.Path(file_okay=False, path_type=Path), help="A directory where files and "
              "batches of /v1/files and /v1/batches outlive the server.")
@click.option("--batch-dir-size", type=Size(), default="1GiB", show_default=True, help="Most that files have there, or "
              "in the temporary directory that is in its place.")
@engine_options
@click.option("--lora", multiple=True, type=NamedDirectory(), help="A PEFT adapter that requests may name as their "
              "model; may be given more than once.")
@click.option("--max-loras", type=Integer(1, MAX_LORAS), default=8, show_default=True, help="Adapters that may "
              "be loaded at a time, where --lora or --allow-runtime-lora-updating is given.")
@click.option("--allow-runtime-lora-updating", is_flag=True, help="/v1/load_lora_adapter and /v1/unload_lora_adapter: "
              "whoever may send requests may have directories of this machine read as adapters.")
@click.option("--max-waiting-requests", type=Integer(1), default=256, show_default=True,
              help="Past so many in the queue a request is refused with 429.")
@click.option("--max-waiting-tokens", type=Integer(1), default=1 << 20, show_default=True,
              help="Past so many prompt tokens in the queue a request is refused with 429.")
@click.option("--max-wait", type=Number(0, min_open=True), default=10.0, show_default=True,
              help="A request that would wait longer for its first token, in seconds, is refused with 429.")
@click.option("--itl-target", type=Number(0, min_open=True), help="Seconds from one token of an answer to "
              "the next (inter-token latency): a step that would take longer has less of others' prompts.")
@click.option("--api-key", "api_keys", multiple=True, help="Clients must send it as a bearer token; may be given more "
              "than once.")
@click.option("--api-keys-file", type=ExistingFile(), help="A key a line, or its hash as NAME=sha256:HEX, with "
              "priority=N and max_requests=N after it where wanted; read again on SIGHUP.")
@click.option("--admin-port", type=Integer(0, 65535), help="A port of its own for POST /admin/reload, sleep and "
              "wake, which swap and unload models.")
@click.option("--admin-key", help="What --admin-port asks for.")
@click.option("--models-memory", type=Size(), help="What several models may take together (what is available); the one "
              "used longest ago makes room.")
@click.option("--ray", is_flag=True, help="Serve by replicas on Ray: of this machine, or of the cluster at "
              "RAY_ADDRESS.")
@click.option("--replicas", metavar="MIN:MAX", help="How many with --ray, as many as the load wants (1).")
@click.option("--public-metrics", is_flag=True, help="/metrics asks for no key.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="json: an object a line.")
@click.option("--metrics-aliases", type=click.Choice(["none", "vllm"]), default="none", show_default=True,
              help="vllm: /metrics has vLLM's names, too, for dashboards, autoscalers and gateways that read those.")
@click.option("--no-page", "page", is_flag=True, flag_value=False, default=True, help="No page to chat on at /.")
@click.option("--drain-timeout", type=Number(0), default=30.0, show_default=True,
              help="Seconds that running requests get after SIGTERM.")
@click.option("--stall-timeout", type=Number(0, min_open=True), default=60.0, show_default=True,
              help="/livez fails when requests wait and no step has ended for so many seconds.")
@click.option("--verify-weights", is_flag=True, help="Check the artifact's hashes, also where they were before and no "
              "size or time has changed.")
@click.option("--scrub-interval", type=Number(0), default=3600.0, show_default=True,
              help="Seconds in which the artifact's files are read and hashed once while serving; 0: never.")
def serve(artifact: tuple[str, ...], recipe: str | None, model_names: tuple[str, ...], generation_config: str,
          lora: tuple[str, ...], max_loras: int, ray: bool, replicas: str | None, **options: Any) -> None:
    """Serve ARTIFACT over HTTP, or several, each as NAME=ARTIFACT where it is to have another name than its own.

    Each option is a variable, too, as FPTQ_MAX_MODEL_LEN for --max-model-len, and a key of --config's file. Flags go
    before variables, variables before the file, the file before defaults. `fptq config` shows what is in force.
    """
    if not all(name.strip() for name in model_names):
        raise click.UsageError("--served-model-name is empty; give clients a name, or leave it out")
    from fptq_runtime.locate import DEMO, find_artifact, find_model, quantized

    named = [_named(each) for each in artifact]
    if len(named) > 1 and model_names:
        raise click.UsageError("--served-model-name is for one ARTIFACT; name each of several as NAME=ARTIFACT")
    if len(named) > 1 and (lora or options["allow_runtime_lora_updating"] or options["draft"]):
        raise click.UsageError("--lora, --allow-runtime-lora-updating and --draft are for one ARTIFACT")
    for _, each in named:
        find_model(each, otherwise="" if each.endswith(".gguf") else f"; `fptq quantize MODEL {each}` makes one")
    if replicas is not None and not ray:
        raise click.UsageError("--replicas is for --ray")
    if ray:
        from fptq_server.ray_serve import parse_replicas, serve_on_ray

        wanted = parse_replicas(replicas or 1)
    from fptq_server.config import ServerConfig
    from fptq_server.main import listen, serve

    of_server = {field.name for field in fields(ServerConfig)} & options.keys()
    config = ServerConfig(**{name: options.pop(name) for name in of_server})
    adapters = {name: Path(directory) for name, _, directory in (each.partition("=") for each in lora)}
    if len(adapters) < len(lora):
        raise click.UsageError("--lora gives one name twice")
    options |= {"lora": adapters, "max_loras": max_loras if lora or config.allow_runtime_lora_updating else 0}
    options["generation_config"] = generation_config != "none"

    def ready(artifact: str) -> tuple[str, Path]:
        """Its own name, and where it is."""
        path = find_artifact(artifact)
        from fptq_runtime.artifact.io import is_artifact
        from fptq_runtime.models.loader import Checkpoint

        name = DEMO if artifact == DEMO else path.resolve().name
        if is_artifact(path) or Checkpoint(path).quantized:
            return name, path
        if recipe is None:
            raise FptqError(f"{artifact} is not quantized; make an artifact with `fptq quantize {artifact} OUT` "
                            "first, or serve it with --quantize fptq-best")
        name = Path(artifact).name or name
        return name, quantized(path, recipe, name)

    def found() -> list[tuple[tuple[str, ...], Path]]:
        models = []
        for name, each in named:
            own, path = ready(each)
            models.append(((name,) if name else model_names or (own,), path))
        return models

    if ray:
        serve_on_ray(found(), config, wanted, **options)
        return
    with listen(config) as listener:  # before the model is fetched or made, which can take minutes
        (names, path), *others = found()
        serve(path, config, model_names=names, others=others, listener=listener, **options)


def _named(artifact: str) -> tuple[str | None, str]:
    """NAME=ARTIFACT, unless that is a path itself."""
    name, equals, rest = artifact.partition("=")
    return (name, rest) if equals and name and "/" not in name and not Path(artifact).exists() else (None, artifact)


@cli.command()
@click.argument("artifact")
@click.argument("requests", metavar="IN", type=ExistingFile())
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--served-model-name", "model_names", multiple=True, help="As for `fptq serve`.")
@click.option("--chat-template", type=ExistingFile(), help="As for `fptq serve`.")
@click.option("--default-chat-template-kwargs", "chat_template_kwargs", type=JsonObject(), default={}, metavar="JSON",
              help="As for `fptq serve`.")
@click.option("--generation-config", type=click.Choice(["auto", "none"]), default="auto", show_default=True,
              help="As for `fptq serve`.")
@click.option("--tool-call-parser", default="auto", show_default=True, metavar="NAME", help="As for `fptq serve`.")
@click.option("--reasoning-parser", default="auto", show_default=True, metavar="NAME", help="As for `fptq serve`.")
@engine_options
@answers
def batch(artifact: str, requests: Path, out: Path, model_names: tuple[str, ...], generation_config: str,
          **options: Any) -> Answer:
    """Answer the requests of the file IN, each a line as OpenAI's batches have them, with ARTIFACT, into the file OUT.

    A request that fails is answered with its error. Whatever ends this command, the same command goes on with what has
    no answer yet.
    """
    from fptq_runtime.locate import DEMO, find_artifact
    from fptq_server.config import ServerConfig
    from fptq_server.offline import answer_file

    of_server = {field.name for field in fields(ServerConfig)} & options.keys()
    config = ServerConfig(**{name: options.pop(name) for name in of_server})
    names = model_names or ((DEMO,) if artifact == DEMO else ())
    result = answer_file(find_artifact(artifact), requests, out, config, model_names=names, progress=True,
                         generation_config=generation_config != "none", **options)
    return asdict(result), (f"{result.lines} requests are answered in {out}, {result.failed} of them with an error"
                            + (f"; {result.resumed} were before" if result.resumed else ""))


SECRETS = ("api_key", "admin_key")


def _shown(name: str, value: Any) -> Any:
    """As `fptq config` prints it: no secrets, and one artifact as a text."""
    if name in SECRETS:
        return ["***" for _ in value] if isinstance(value, (tuple, list)) else value and "***"
    if name == "artifact":
        return None if not value else value[0] if len(value) == 1 else value
    return value


@cli.command("config", params=[click.Argument(["artifact"], nargs=-1, required=False), *serve.params[1:]])
@answers
def show_config(**options: Any) -> Answer:
    """What `fptq serve` with the same options would be told, and where each value comes from: a --config file."""
    from fptq_server.config import ServerConfig

    ServerConfig(**{field.name: options[field.name] for field in fields(ServerConfig) if field.name in options})
    ctx = click.get_current_context()
    data, lines = {}, []
    for name, parameter in settings().items():
        value, origin = _switched(parameter, options[str(parameter.name)]), _origins(ctx).get(str(parameter.name))
        if origin is None:
            given = ctx.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
            origin = "the command line" if given else "default"
        flag = name.replace("_", "-")
        plain = json.dumps(_shown(name, value), default=str, ensure_ascii=False)
        data[flag] = {"value": json.loads(plain), "from": origin}
        meaning = getattr(parameter, "help", None) if value is None else None
        lines.append(f"{'# ' if name in SECRETS and value else ''}{flag}: {plain}  # {origin}"
                     + (f": {_one_line(meaning)}" if meaning else ""))
    return data, "\n".join(lines)


@cli.command("recipe")
@click.argument("name", required=False, type=RecipeName())
@answers
def show_recipe(name: str | None) -> Answer:
    """A preset with every setting and what it means, as a file to change and give to --recipe; without NAME, all
    presets."""
    from fptq_runtime.quantizer.recipe import PRESETS, load_recipe, recipe_text

    if name is None:
        return {"presets": [preset.name for preset in PRESETS]}, "\n".join(preset.name for preset in PRESETS)
    recipe = load_recipe(name)
    return recipe.model_dump(mode="json"), recipe_text(recipe)


@cli.command("eval")
@click.argument("model")
@click.option("--text", type=TextFile(), help="Perplexity on a UTF-8 text file; `tales`: text that comes with fptq.")
@text_tokens_option(None)
@click.option("--choices", type=ExistingFile(), help='Multiple choice: a JSON object a line, {"context": …, '
              '"choices": […], "answer": index}.')
@click.option("--last-word", type=ExistingFile(), help='The last word as in LAMBADA: {"text": …} a line.')
@click.option("--task", "tasks", multiple=True, help="An lm-eval task, a YAML file or a name; may be given more than "
              "once.")
@click.option("--limit", type=Integer(1), help="Only the first documents of each --task.")
@click.option("--kv-cache-dtype", type=click.Choice(["bf16", "int8"]), default="bf16", show_default=True,
              help="As `fptq serve` has it: int8.")
@activation_option
@backend_options
@answers
def evaluate(model: str, text: Path | None, text_tokens: int | None, choices: Path | None, last_word: Path | None,
             tasks: tuple[str, ...], **options: Any) -> Answer:
    """Perplexity of MODEL, in float or quantized, on a text, and its accuracy in tasks."""
    if not (text or choices or last_word or tasks):
        raise click.UsageError("give what to evaluate on: --text, --choices, --last-word or --task")
    from fptq_runtime.locate import find_artifact

    path = find_artifact(model)
    from fptq_runtime.measure.evaluate import evaluate

    result = evaluate(path, text, choices, last_word, tasks, max_tokens=text_tokens, progress=True, **options)
    return result.to_json(), result.summary()


@cli.command()
@click.argument("model")
@click.option("--recipes", type=RecipeList(), help="Presets or YAML files between commas, as rtn,fptq; with --protocol "
              "smoothquant,fptq,fptq-best unless given.")
@click.option("--checkpoint", "checkpoints", multiple=True, type=NamedDirectory(), help="A row called name for what "
              "was quantized from MODEL before, or by another tool; may be given more than once.")
@click.option("--protocol", type=click.Choice(["wikitext2"]), help="Measure as papers do, on the whole of --text, "
              "which is WikiText-2's raw test split, beside what they publish.")
@click.option("--calibration", type=ExistingFile("self", "chat", "tales", "random"), help="As for `fptq quantize`.")
@click.option("--num-samples", type=Integer(1), default=32, show_default=True, help="Calibration samples.")
@click.option("--text", type=TextFile(), help="What perplexity and KL are measured on (tales that calibration "
              "never sees).")
@text_tokens_option(None, "16384, or with --protocol all")
@click.option("--choices", type=ExistingFile(), help="Multiple choice, as for `fptq eval`.")
@click.option("--last-word", type=ExistingFile(), help="Last words, as for `fptq eval`.")
@click.option("--task", "tasks", multiple=True, help="An lm-eval task, a YAML file or a name; may be given more than "
              "once.")
@click.option("--limit", type=Integer(1), help="Only the first documents of each --task.")
@click.option("--chat", is_flag=True, help="Also answer twenty everyday prompts: how many answers loop or are empty, "
              "and how far they are the float model's.")
@click.option("--seed", type=Integer(0), default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Write compare.md, compare.svg and "
              "compare.json into this directory.")
@backend_options
@answers
def compare(model: str, recipes: tuple[str, ...] | None, checkpoints: tuple[str, ...],
            protocol: Literal["wikitext2"] | None, calibration: str | Path | None, num_samples: int, text: Path | None,
            text_tokens: int | None, choices: Path | None, last_word: Path | None, tasks: tuple[str, ...],
            limit: int | None, chat: bool, seed: int, out: Path | None, backend: str, device: str, threads: int
            ) -> Answer:
    """Quantize MODEL by several recipes and measure each: quality, size, time and speed in one table."""
    if protocol is None:
        text_tokens = text_tokens or 16384
    elif text is None:
        raise click.UsageError(f"--protocol {protocol} needs --text FILE, the raw test split of WikiText-2")
    if recipes is None:
        if protocol is None and not checkpoints:
            raise click.UsageError("--recipes names what is compared, as rtn,fptq")
        recipes = PROTOCOL_RECIPES if protocol else ()
    from fptq_runtime.locate import find_model

    source = find_model(model)
    from fptq_runtime.artifact.io import check_writable

    if out is not None:
        check_writable(out)
    _limit_torch(threads)
    from fptq_runtime.measure import compare as comparing
    from fptq_runtime.quantizer.calibrate import packaged_text, read_text
    from fptq_runtime.quantizer.recipe import load_recipe
    from fptq_runtime.quantizer.samples import Calibration

    result = comparing.compare(
        source, [load_recipe(name) for name in recipes], read_text(text) if text else packaged_text("heldout"),
        backend, name=model, calibration=Calibration(calibration, num_samples, seed=seed), max_tokens=text_tokens,
        accuracy=comparing.Tasks(tasks, limit, choices, last_word, chat), protocol=protocol,
        checkpoints={name: Path(path) for name, _, path in (given.partition("=") for given in checkpoints)},
        threads=threads, device=device, progress=True,
    )
    data, table = result.to_json(), comparing.markdown(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.md").write_text(f"{table}\n![compared](compare.svg)\n")
        (out / "compare.svg").write_text(comparing.plot(result) + "\n")
        (out / "compare.json").write_text(json.dumps(data, indent=1) + "\n")
    return data, table


@cli.command()
@click.argument("model")
@click.option("--recipe", type=RecipeName(), default="fptq-best", show_default=True, help="A preset, or a YAML file.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="report", show_default=True,
              help="Where index.html, analysis.json and analysis.jsonl go; an interrupted analysis there goes on.")
@click.option("--calibration", type=ExistingFile("self", "chat", "tales", "random"), help="As for `fptq quantize`.")
@click.option("--num-samples", type=Integer(1), default=32, show_default=True, help="Calibration samples.")
@click.option("--text", type=TextFile(), help="What the loss is measured on (tales that calibration never sees).")
@text_tokens_option(4096)
@click.option("--only", "studies", multiple=True, type=click.Choice(
    ["one-only", "linears", "leave-one-out", "cumulative", "activations", "sizes", "ranges"]),
    help="Do only this study; may be given more than once.")
@click.option("--quick", is_flag=True, help="Only kinds and layers one by one, and the inputs.")
@click.option("--sizes", type=Integer(1), multiple=True, help="Numbers of samples to compare (100, 200, 500).")
@click.option("--seed", type=Integer(0), default=0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace another analysis at --out.")
@threads_option
@answers
def analyze(model: str, recipe: str, out: Path, calibration: str | Path | None, num_samples: int, text: Path | None,
            text_tokens: int, studies: tuple[str, ...], quick: bool, sizes: tuple[int, ...], seed: int, threads: int,
            **options: Any) -> Answer:
    """Which layers of MODEL a recipe hurts, why, and what to do: a report that opens in a browser."""
    if quick and studies:
        raise click.UsageError("--quick and --only exclude each other")
    from fptq_runtime.locate import find_model

    source = find_model(model)
    from fptq_runtime.artifact.io import check_writable

    check_writable(out)
    _limit_torch(threads)
    from fptq_runtime.analysis import analyze as analyzing
    from fptq_runtime.analysis.advice import advise
    from fptq_runtime.analysis.page import page
    from fptq_runtime.quantizer.calibrate import packaged_text, read_text
    from fptq_runtime.quantizer.recipe import load_recipe
    from fptq_runtime.quantizer.samples import Calibration

    data = analyzing.analyze(
        source, load_recipe(recipe), read_text(text) if text else packaged_text("heldout"), out, name=model,
        calibration=Calibration(calibration, num_samples, seed=seed),
        studies=studies or (analyzing.QUICK if quick else analyzing.STUDIES), sizes=sizes or analyzing.SIZES,
        max_tokens=text_tokens, progress=True, **options,
    )
    data["recommendation"] = advice = advise(data, recipe)
    (out / "analysis.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    (out / "index.html").write_text(page(data, advice), "utf-8")
    return data, "\n".join([advice["verdict"], "", *(f"- {reason}" for reason in advice["reasons"]), "",
                            *(f"next: {command}" for command in advice["commands"]),
                            f"the report is {out / 'index.html'}"])


@cli.command()
@click.argument("artifact")
@click.argument("prompt")
@click.option("--max-tokens", type=Integer(1), default=64, show_default=True)
@click.option("--temperature", type=Number(0), default=1.0, show_default=True)
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=Integer(0), default=0, help="0: off.")
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, help="Text to stop before; may be given more than once.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@engine_options
@answers
def generate(artifact: str, prompt: str, max_tokens: int, temperature: float, top_p: float, top_k: int,
             seed: int | None, stop: tuple[str, ...], chat: bool, **options: Any) -> Answer:
    """Answer PROMPT with ARTIFACT."""
    from fptq_runtime.engine.request import SamplingParams
    from fptq_runtime.locate import load

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                            stop=stop)
    llm = load(artifact, **options)
    messages = [{"role": "user", "content": prompt}]
    [[answer]] = llm.generate([llm.engine.tokenizer.apply_chat_template(messages) if chat else prompt], params)
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason.value,
        "prompt_token_ids": answer.prompt_token_ids,
        "token_ids": answer.token_ids,
    }, answer.text


@cli.command()
@click.argument("artifact")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["vllm"]), required=True, help="Who will load it.")
@click.option("--text", type=TextFile(), help="What perplexity is measured on before and after (tales that come "
              "with fptq).")
@text_tokens_option(16384)
@click.option("--overwrite", is_flag=True, help="Replace an artifact or an earlier export at OUT.")
@backend_options
@answers
def export(artifact: str, out: Path, target: str, text: Path | None, text_tokens: int, overwrite: bool, backend: str,
           device: str, threads: int) -> Answer:
    """Write ARTIFACT into the directory OUT for another runtime, every quantized input dynamic per token."""
    from fptq_runtime.artifact.io import check_output
    from fptq_runtime.locate import find_artifact

    check_output(out, overwrite, Path(artifact))
    path = find_artifact(artifact)
    from fptq_runtime.kernels.select import select_backend
    from fptq_runtime.models.loader import Checkpoint
    from fptq_runtime.quantizer.calibrate import packaged_text, read_text
    from fptq_runtime.quantizer.vllm import export

    kernels = select_backend(backend, threads, Checkpoint(path).linear_schemes, device)
    measured_on = packaged_text("heldout") if text is None else read_text(text)
    result = export(path, out, measured_on, kernels, text_tokens, overwrite, progress=True)
    change = result.perplexity_after / result.perplexity_before - 1
    return {"target": target, **asdict(result)}, (
        f"perplexity {result.perplexity_before:.3f} before, {result.perplexity_after:.3f} after ({change:+.2%}) on "
        f"{result.text}: {result.tokens} tokens\n{result.static_inputs} static input scales became dynamic, "
        f"{result.bytes / 1e6:.1f} MB"
    )


@cli.command()
@click.argument("artifact")
@answers
def inspect(artifact: str) -> Answer:
    """What was done to ARTIFACT, layer by layer, and what it cost."""
    from fptq_runtime.locate import find_artifact

    path = find_artifact(artifact)
    from fptq_runtime.artifact.io import read_manifest
    from fptq_runtime.quantizer.report import inspect_text

    manifest = read_manifest(path)
    return manifest.model_dump(mode="json"), inspect_text(manifest)


@cli.command()
@click.argument("artifact")
@click.option("--renew", is_flag=True, help="After its hashes hold, record golden values of every block in an artifact "
              "made before there were any.")
@click.option("--receipt", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="Compute the answers of a receipt (`return_receipt`) again, instead.")
@backend_options
@answers
def verify(artifact: str, renew: bool, receipt: Path | None, backend: str, device: str, threads: int) -> Answer:
    """Check every hash of ARTIFACT, and its golden values on this machine's kernels."""
    from fptq_runtime.locate import find_artifact

    path = find_artifact(artifact)
    if receipt is not None:
        if renew:
            raise click.UsageError("--receipt and --renew do not go together")
        from fptq_runtime.engine.receipt import replay

        done = replay(path, receipt, backend=backend, device=device, threads=threads)
        return {"choices": done.choices, "tokens": done.tokens}, (
            f"{done.tokens} tokens of {done.choices} {'choice' if done.choices == 1 else 'choices'} are the receipt's")
    from fptq_runtime.artifact import io
    from fptq_runtime.kernels.select import select_backend
    from fptq_runtime.models.gate import check_artifact
    from fptq_runtime.models.loader import Checkpoint, load_model

    manifest = io.verify(path)
    if renew:
        from fptq_runtime.quantizer.record import renew_golden

        manifest = renew_golden(path, manifest)
    checkpoint = Checkpoint(path)
    kernels = select_backend(backend, threads, checkpoint.linear_schemes, device)
    ratio = check_artifact(path, manifest, load_model(checkpoint, kernels), kernels, checkpoint.max_positions)
    golden = f"golden values agree, at most {ratio:.2f} of what is tolerated" if ratio is not None else (
        f"it holds golden logits alone, which cannot tell a fault of a deep model from rounding: "
        f"`fptq verify {artifact} --renew` records golden values of every block")
    return {"files": len(manifest.files), "bytes": manifest.size, "golden_deviation": ratio}, (
        f"{len(manifest.files)} files match their hashes; {golden}"
    )


@cli.command()
@click.argument("artifact", required=False)
@click.option("--shape", type=click.Choice(["llama-3.2-1b", "qwen2.5-0.5b", "llama-2-7b", "llama-3-8b",
                                            "qwen3-30b-a3b-12-layers"]),
              help="Random weights of this shape, instead of ARTIFACT.")
@click.option("--head-bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Of a --shape.")
@click.option("--phase", "phases", type=click.Choice(["prefill", "decode"]), multiple=True, help="Measure only this.")
@click.option("--batch", "batches", type=Integer(1), multiple=True,
              help="Concurrent sequences; may be given more than once (1 to 32; 1 and 8 at long contexts).")
@click.option("--context", "contexts", type=Integer(1), multiple=True,
              help="Tokens of each prompt; may be given more than once (512 and 2048).")
@click.option("--steps", type=Integer(1), default=24, show_default=True, help="Steps of decoding in a run.")
@click.option("--seconds", type=Number(0), default=3.0, show_default=True,
              help="Runs of a row are repeated for so long, and the median is shown.")
@click.option("--max-num-batched-tokens", type=Integer(1), default=512, show_default=True,
              help="Most tokens in one step.")
@click.option("--kv-cache-dtype", type=click.Choice(["bf16", "int8"]), default="int8", show_default=True)
@activation_option
@backend_options
@answers
def bench(artifact: str | None, shape: str | None, head_bits: str, activations: Any, **options: Any) -> Answer:
    """Prefill and decode tokens per second of ARTIFACT or a --shape, by batch size and context, and what part of this
    machine's roofs that is."""
    if (artifact is None) == (shape is None):
        raise click.UsageError("give either an ARTIFACT or --shape")
    if shape is not None and activations != "checkpoint":
        raise click.UsageError("--activations is for an ARTIFACT; a --shape has int8 activations")
    from fptq_runtime.locate import find_artifact
    from fptq_runtime.measure.bench import bench

    model = shape or find_artifact(str(artifact))
    result = bench(model, name=artifact, head_bits=int(head_bits), activations=activations, progress=True, **options)
    return result.to_json(), result.table()


@cli.command()
@click.option("--profile", type=ExistingFile(), required=True, help="What `fptq bench ARTIFACT --json` printed on the "
              "machine of a replica.")
@click.option("--trace", type=ExistingFile(), required=True, help="Requests: Azure's CSV, or Mooncake's JSON lines "
              "with prefix hashes.")
@click.option("--slo", required=True, help="As ttft_p99=2s,itl_p99=100ms: of the first token, between two, and e2e of "
              "whole answers.")
@click.option("--replicas", type=Integer(1), help="Look at so many, instead of for the fewest.")
@click.option("--routing", "routings", type=click.Choice(["round-robin", "least-loaded", "prefix"]), multiple=True,
              help="May be given more than once (round-robin, and prefix where the trace has hashes).")
@click.option("--sample", type=Integer(1), help="Simulate only so many of the --replicas, with their share of the "
              "requests.")
@click.option("--day", "peak", type=Number(0, min_open=True), help="24 hours of requests like the trace's at random "
              "times instead: so many a second at noon, a third of it at midnight.")
@click.option("--limit", type=Integer(1), help="Take only the first requests of the trace.")
@click.option("--cost-per-hour", type=Number(0), help="Of a replica, in any currency.")
@click.option("--max-num-seqs", type=Integer(1), default=64, show_default=True, help="As of fptq serve, like the next.")
@click.option("--max-model-len", type=Integer(1), help="In tokens (the model's own limit).")
@click.option("--kv-cache-memory", type=Size(), default="512MiB", show_default=True)
@click.option("--itl-target", type=Number(0, min_open=True), help="Seconds.")
@click.option("--delivery", type=Number(0), default=0.0, show_default=True, help="Seconds that each token takes "
              "beside its step, as text and over HTTP.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write an SVG: the objectives by load.")
@answers
def plan(profile: Path, trace: Path, slo: str, limit: int | None, plot: Path | None, **options: Any) -> Answer:
    """How many replicas meet objectives of latency under a trace of requests, what they cost and where they break: a
    simulation with the engine's own scheduler."""
    from fptq_runtime.measure import plan as planning

    try:
        measured = json.loads(profile.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FptqError(f"{profile} is not JSON: {error}", "profile") from None

    def shown(outcome: planning.Outcome) -> None:
        click.echo(f"{outcome.replicas} replicas, {outcome.routing}, {outcome.load:g}× the load: "
                   f"{'met' if outcome.met else 'missed'}", err=True)

    result = planning.plan(measured, planning.read_trace(trace)[:limit], planning.parse_slo(slo), on_run=shown,
                           **options)
    if plot is not None and result.loads:
        plot.write_text(result.plot() + "\n", encoding="utf-8")
    return result.to_json(), result.table()


if __name__ == "__main__":
    main()
