"""Tasks through the engine. Oracles: transformers' log-softmax, and lm-eval's own model over transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fptq_runtime import cli
from fptq_runtime.engine.llm import LLM
from fptq_runtime.measure import tasks
from fptq_runtime.measure.tasks import Scorer, TaskError
from tests.quantizer.models import save_model

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "green as grass", "a bird"], "answer": 0},
    {"context": "Two and two make ", "choices": ["five", "four"], "answer": 1},
    {"context": "", "choices": ["It rains.", "Rains it."], "answer": 0},
    {"context": "Dogs", "choices": [" bark", " meow", " sing", " swim"], "answer": 3},
]
TEXTS = ["The cat sat on the mat", "Once upon a  time", "He said:\nno  ", "a b"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model("llama", path)
    return path


@pytest.fixture(scope="module")
def scorer(model: Path) -> Scorer:
    return Scorer(LLM(model, kv_cache_dtype="float32", threads=1))


class Oracle:
    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Byte tokens: a text's tokens are its bytes', after one BOS."""
        ids = torch.tensor([self.tokenizer(context + continuation).input_ids])
        count = len(continuation.encode())
        with torch.no_grad():
            logprobs = self.model(ids).logits[0].log_softmax(-1)[-count - 1 : -1]
        picked = ids[0, -count:]
        return float(logprobs.gather(1, picked[:, None]).sum()), bool((logprobs.argmax(-1) == picked).all())


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_multiple_choice_is_transformers(model: Path, scorer: Scorer, tmp_path: Path) -> None:
    oracle = Oracle(model)
    right = normalized = 0
    for question in QUESTIONS:
        context = question.get("context", question.get("question"))
        texts = [choice if not context or context.endswith(" ") or choice.startswith(" ") else " " + choice
                 for choice in question["choices"]]
        values = [oracle.loglikelihood(context, text)[0] for text in texts]
        ours = [value for value, _ in scorer.loglikelihoods([scorer.pair(context, text) for text in texts])]
        if context != "Two and two make ":  # its space is scored too
            assert ours == pytest.approx(values, rel=1e-4)
        by_length = [v / len(choice) for v, choice in zip(values, question["choices"], strict=True)]
        right += values.index(max(values)) == question["answer"]
        normalized += by_length.index(max(by_length)) == question["answer"]
    result = tasks.choices(scorer, write(tmp_path / "questions.jsonl", QUESTIONS))
    assert result.questions == 4
    assert result.accuracy == right / 4
    assert result.accuracy_normalized == normalized / 4


def test_spaces_that_end_a_context_are_scored(model: Path, scorer: Scorer) -> None:
    ours = scorer.loglikelihoods([scorer.pair("make ", "four"), scorer.pair("make", " four")])
    assert ours[0] == ours[1]
    assert ours[0][0] == pytest.approx(Oracle(model).loglikelihood("make", " four")[0], rel=1e-4)


def test_last_words_are_transformers(model: Path, scorer: Scorer, tmp_path: Path) -> None:
    oracle = Oracle(model)
    expected = []
    for text in TEXTS:
        context, word = text.rstrip().rsplit(maxsplit=1)
        expected.append(oracle.loglikelihood(context, " " + word))
    result = tasks.last_words(scorer, write(tmp_path / "words.jsonl", [{"text": text} for text in TEXTS]))
    assert result.texts == len(TEXTS)
    assert math.log(result.perplexity) == pytest.approx(-sum(v for v, _ in expected) / len(TEXTS), rel=1e-4)
    assert result.accuracy == sum(greedy for _, greedy in expected) / len(TEXTS)


def test_a_word_that_the_model_would_say(scorer: Scorer) -> None:
    given = scorer.tokenizer.encode("Once upon")
    params = tasks.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    said = list(scorer.llm.generate([given], params)[0][0].token_ids)
    other = [*said[:2], (said[2] + 1) % 200]
    (_, greedy), (_, not_greedy) = scorer.loglikelihoods([(given, said), (given, other)])
    assert greedy and not not_greedy


def test_a_long_context_is_cut_from_the_left(scorer: Scorer) -> None:
    given, rest = scorer.pair("x" * 300, " end")
    whole = scorer.loglikelihoods([(given, rest)])
    assert whole == scorer.loglikelihoods([(given[-(128 - len(rest)) :], rest)])


@pytest.mark.parametrize(("task", "line", "message"), [
    ("choices", '{"context": "a", "choices": ["b"], "answer": 0}', r"x.jsonl:1: \"choices\" must be two"),
    ("choices", '{"context": "a", "choices": ["b", "c"], "answer": 2}', "0 to 1"),
    ("choices", '{"choices": ["b", "c"], "answer": 1}', "must be a text"),
    ("choices", "\n{", r"x.jsonl:2 is not JSON"),
    ("choices", "[]", "must be a JSON object"),
    ("choices", " \n", "is empty"),
    ("last_words", '{"text": "one"}', "two words"),
])
def test_what_is_no_task(task: str, line: str, message: str, scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(TaskError, match=message):
        getattr(tasks, task)(scorer, tmp_path / "x.jsonl")


def lm_eval_task(path: Path, name: str, **config: Any) -> Path:
    data = write(path / f"{name}.jsonl", [
        {"text": f"{text} {i}", "choices": ["one", "two words"], "gold": i % 2}
        for i, text in enumerate(["The first", "A second one", "Third:", "And the fourth"])
    ])
    file = path / f"{name}.yaml"
    file.write_text(yaml.safe_dump({
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", **config,
    }))
    return file


def local_tasks(path: Path) -> list[Path]:
    return [
        lm_eval_task(path, "local_choice", output_type="multiple_choice", doc_to_text="{{text}}",
                     doc_to_choice="choices", doc_to_target="gold",
                     metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}]),
        lm_eval_task(path, "local_rolling", output_type="loglikelihood_rolling", doc_to_text="",
                     doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}]),
        lm_eval_task(path, "local_generate", output_type="generate_until", doc_to_text="{{text}}", doc_to_target="gold",
                     generation_kwargs={"until": ["\n"], "max_gen_toks": 4}, metric_list=[{"metric": "exact_match"}]),
    ]


def test_lm_eval_over_transformers_agrees(model: Path, scorer: Scorer, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """One request of every kind."""
    pytest.importorskip("lm_eval")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    theirs = huggingface.HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=1, add_bos_token=True)
    ours = tasks._language_model(scorer)

    def requests(kind: str, *arguments: Any) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]

    pairs = [("The sky is", " blue"), ("", "alone"), ("space ", "after"), ("x" * 90, " long")]
    expected = theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (a, greedy), (b, also) in zip(ours.loglikelihood(requests("loglikelihood", *pairs)), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4) and greedy == also
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    generating = requests("generate_until", ("Once upon", settings), ("The", settings))
    assert ours.generate_until(generating) == theirs.generate_until(generating, disable_tqdm=True)


def test_tasks_by_file(scorer: Scorer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    results = tasks.lm_eval_tasks(scorer, [str(file) for file in local_tasks(tmp_path)])
    assert set(results) == {"local_choice", "local_rolling", "local_generate"}
    assert set(results["local_choice"]) == {"acc", "acc_norm"}
    assert results["local_rolling"]["word_perplexity"] > 1
    assert set(tasks.accuracies(results)) == set(results)
    data = [json.loads(line) for line in (tmp_path / "local_choice.jsonl").read_text().splitlines()]
    own = write(tmp_path / "own.jsonl", [
        {"context": line["text"], "choices": line["choices"], "answer": line["gold"]} for line in data])
    assert results["local_choice"]["acc"] == tasks.choices(scorer, own).accuracy
    assert results["local_choice"]["acc_norm"] == tasks.choices(scorer, own).accuracy_normalized


def test_a_file_that_is_no_task(scorer: Scorer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "bad.yaml").write_text("- 1\n")
    with pytest.raises(TaskError, match="no lm-eval task"):
        tasks.lm_eval_tasks(scorer, [str(tmp_path / "bad.yaml")])


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 20)
    arguments = ["eval", str(model), "--text", str(tmp_path / "text.txt"), "--choices",
                 str(write(tmp_path / "q.jsonl", QUESTIONS)), "--last-word",
                 str(write(tmp_path / "w.jsonl", [{"text": text} for text in TEXTS])), "--threads", "1"]
    with pytest.raises(SystemExit) as exit_code:
        cli.main([*arguments, "--json"])
    assert exit_code.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"perplexity", "tokens", "window", "text", "text_sha256", "choices", "last_word"} == set(answer)
    assert answer["choices"]["questions"] == 4 and answer["last_word"]["texts"] == 4
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["perplexity", "accuracy", "last-word"]


def test_the_command_wants_something_to_evaluate_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["eval", "demo"])
    assert exit_code.value.code == 2
    assert "--text, --choices, --last-word or --task" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(TaskError, match=r"pip install 'fptq-serve\[eval\]'"):
        tasks.lm_eval_tasks(scorer, ["hellaswag"])
