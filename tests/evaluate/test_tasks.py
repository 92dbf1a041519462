"""Tasks of lm-eval on data of our own, against what the decoder says when asked plainly."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from colossus.data import Tokenizer
from colossus.errors import ConfigError, HubUnavailable
from colossus.evaluate.tasks import Metric, check_lm_eval, find_tasks, run_tasks
from colossus.generate import LoadedModel, Sampling, generate
from tests.evaluate.test_command import as_json, evaluate

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "the cat sat on", "choices": ["the mat", "a dog", "naïve answers"], "answer": 0},
    {"question": "the dog", "choices": ["sat", "sat on the cat", "mat"], "answer": 1},
    {"question": "on the", "choices": ["cat", "the", "mat"], "answer": 2},
    {"question": "🙂", "choices": ["the cat", "answers", "on the dog"], "answer": 1},
    {"question": "sat", "choices": ["on", "the", "on the mat, the dog sat on"], "answer": 2},
]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
TASKS = {
    "choose": """task: choose
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
""",
    "write": """task: write
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["t"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""",
    "perplex": """task: perplex
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices | join(' ')}} {{choices | join(' ')}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library keeps what it has read; not where the next person's runs find it."""
    import datasets.config

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text + COMMON.replace("{data}", str(data)))
    return folder


def asked(loaded: LoadedModel, folder: Path, name: str, **settings: Any) -> dict[str, float]:
    """Values by metric."""
    from colossus.evaluate.language_model import ColossusLM

    lm = ColossusLM(
        loaded, batch=settings.pop("batch", 4), context_tokens=settings.pop("context_tokens", None)
    )
    return {one.metric: one.value for one in run_tasks(lm, found(folder, name), **settings)}


def found(folder: Path, name: str) -> list[Any]:
    return find_tasks([str(folder / f"{name}.yaml")])


def log_probability(loaded: LoadedModel, context: str, continuation: str) -> float:
    """Of the continuation, after a space, from the decoder alone."""
    ids = [loaded.tokenizer.end_of_document, *map(int, loaded.tokenizer.encode(f"{context} {continuation}"))]
    known = 1 + len(loaded.tokenizer.encode(context))
    logits = loaded.model.logits(loaded.model(torch.tensor([ids[:-1]])))[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(known, len(ids)))


def test_choices_by_hand(loaded: LoadedModel, folder: Path) -> None:
    right = 0
    for question in QUESTIONS:
        of_choices = [log_probability(loaded, question["question"], choice) for choice in question["choices"]]
        right += of_choices.index(max(of_choices)) == question["answer"]
    assert 0 < right < len(QUESTIONS)  # else a constant would do
    for batch in (1, 3, 64):
        assert asked(loaded, folder, "choose", batch=batch) == {"acc": right / len(QUESTIONS)}


def test_writing_by_the_generator(loaded: LoadedModel, folder: Path) -> None:
    from colossus.evaluate.language_model import ColossusLM

    sampling = Sampling(temperature=0, max_tokens=12, stop=("t",))
    expected = [
        "".join(generate(loaded.model, loaded.tokenizer, question["question"], sampling))
        for question in QUESTIONS
    ]
    assert len(set(expected)) > 1
    (task,) = found(folder, "write")
    for batch in (1, 2, 8):
        lm = ColossusLM(loaded, batch=batch)
        seen: list[str] = []
        answer = lm.generate_until

        def listen(requests: list[Any], answer: Any = answer, seen: list[str] = seen, **_: Any) -> list[str]:
            seen += answer(requests)
            return seen

        lm.generate_until = listen  # type: ignore[method-assign]
        (metric,) = run_tasks(lm, [task])
        assert seen == expected
        assert metric.value == sum(
            text == question["choices"][question["answer"]]
            for text, question in zip(expected, QUESTIONS, strict=True)
        ) / len(QUESTIONS)


@pytest.mark.parametrize("context_tokens", [None, 7])
def test_perplexity_by_hand(loaded: LoadedModel, folder: Path, context_tokens: int | None) -> None:
    texts = [
        " ".join([question["question"], *question["choices"], *question["choices"]]) for question in QUESTIONS
    ]
    width = context_tokens or loaded.model.spec.context_tokens
    nats = 0.0
    for text in texts:
        ids = [loaded.tokenizer.end_of_document, *map(int, loaded.tokenizer.encode(text))]
        for first in range(0, len(ids) - 1, width):
            last = min(first + width, len(ids) - 1)
            inputs = torch.tensor([ids[max(0, last - width) : last]])  # the last window is a whole one
            logits = loaded.model.logits(loaded.model(inputs))[0].double().log_softmax(-1)
            nats -= sum(float(logits[place - last - 1, ids[place]]) for place in range(first + 1, last + 1))
    if context_tokens is not None:
        assert max(len(loaded.tokenizer.encode(text)) for text in texts) > 2 * width
    values = asked(loaded, folder, "perplex", context_tokens=context_tokens)
    num_bytes, num_words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert values["word_perplexity"] == pytest.approx(math.exp(nats / num_words), rel=1e-4)


def test_as_the_same_weights_in_transformers(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # which that class of lm-eval's needs
    from lm_eval.models.huggingface import HFLM

    from colossus.checkpoint.hugging_face import write_directory
    from colossus.evaluate.language_model import ColossusLM

    parameters = dict(loaded.model.named_parameters())
    kept = tmp_path / "tokenizer"
    kept.mkdir()
    loaded.tokenizer.save(kept)
    write_directory(
        loaded.model.spec, lambda name: parameters[name], tmp_path / "model", tokenizer=kept, card=""
    )
    settings = {
        "pretrained": transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
        "batch_size": 3,
    }
    theirs = HFLM(**settings)
    # Where it asks for every token of a text, that class puts END before it itself, and the tokenizer must not.
    theirs_of_texts = HFLM(**settings, add_bos_token=False)
    for name in TASKS:
        expected = run_tasks(theirs_of_texts if name == "perplex" else theirs, found(folder, name))
        ours = run_tasks(ColossusLM(loaded, batch=3), found(folder, name))
        assert [one.metric for one in ours] == [one.metric for one in expected]
        for one, other in zip(ours, expected, strict=True):
            assert one.value == pytest.approx(other.value, rel=1e-4)
    requests = [
        (question["question"], f" {choice}") for question in QUESTIONS for choice in question["choices"]
    ]
    for one, other in zip(*(_likelihoods(lm, requests) for lm in (theirs, ColossusLM(loaded))), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3)
        assert one[1] == other[1]


def _likelihoods(lm: Any, requests: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    from lm_eval.api.instance import Instance

    instances = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(requests)]
    answers: list[tuple[float, bool]] = lm.loglikelihood(instances)
    return answers


def test_whether_a_continuation_is_what_greedy_decoding_writes(loaded: LoadedModel) -> None:
    from colossus.evaluate.language_model import ColossusLM

    lm, end = ColossusLM(loaded), loaded.tokenizer.end_of_document
    ids = [end, 5]
    for _ in range(4):
        ids.append(int(loaded.model.logits(loaded.model(torch.tensor([ids])))[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 256]
    rows = [(None, ids[:2], ids[2:]), (None, ids[:2], other[2:]), (None, ids[:2], [])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(rows)] == [True, False, True]


TEMPLATE = (
    "{% for message in messages %}{{ bos_token }}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_by_the_chat_template(loaded: LoadedModel, folder: Path) -> None:
    from colossus.evaluate.language_model import ColossusLM

    end = loaded.tokenizer.end_of_document
    spelled = loaded.tokenizer.decode([end])
    chatting = dataclasses.replace(loaded, chat_template=TEMPLATE, special_tokens={"bos_token": spelled})
    lm = ColossusLM(chatting)
    assert lm.tok_encode(f"{spelled}the", add_special_tokens=False).count(end) == 0  # text is text
    text = lm.apply_chat_template([{"role": "user", "content": "the cat"}])
    assert text == f"{spelled}user: the cat\nassistant: "
    ids = lm.tok_encode(text)
    assert ids[0] == end
    assert ids.count(end) == 1
    assert loaded.tokenizer.decode(ids) == text
    values = asked(chatting, folder, "choose", chat=True)
    right = 0
    for question in QUESTIONS:
        prompt = f"user: {question['question']}\nassistant:"
        of_choices = [log_probability(loaded, prompt, choice) for choice in question["choices"]]
        right += of_choices.index(max(of_choices)) == question["answer"]
    assert values == {"acc": right / len(QUESTIONS)}
    with pytest.raises(ConfigError, match="has no chat template"):
        ColossusLM(loaded).apply_chat_template([])


# --- what cannot be ---


def test_a_data_set_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colossus.evaluate.tasks._hub_answers", lambda: False)
    (tmp_path / "away.yaml").write_text("task: away\ndataset_path: some/questions\ntest_split: test\n")
    with pytest.raises(HubUnavailable, match=r"task .*away.yaml needs a data set .* cannot be fetched"):
        found(tmp_path, "away")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("task: [", "cannot be used"),
        ("output_type: multiple_choice", "cannot be used"),
        (TASKS["choose"].replace("{{question}}", "{{nonsense.more}}"), "'nonsense' is undefined"),
        (TASKS["write"].replace("{{question}}", "{{1 // (choices | length - 3)}}"), "cannot be used"),
        (TASKS["choose"].replace("{{question}}", "{{1 // (answer - 2)}}"), "could not run wrong.*division"),
    ],
)
def test_a_task_that_is_wrong(
    loaded: LoadedModel, folder: Path, tmp_path: Path, text: str, sentence: str
) -> None:
    data = COMMON.replace("{data}", str(folder / "questions.jsonl"))
    (tmp_path / "wrong.yaml").write_text(text.replace("task: choose", "task: wrong") + data)
    with pytest.raises(ConfigError, match=sentence):
        asked(loaded, tmp_path, "wrong")


def test_names_are_looked_for_in_the_folder_first(folder: Path) -> None:
    tasks = find_tasks(["choose", "perplex"], [folder])
    assert [task.task_name for task in tasks] == ["choose", "perplex"]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'colossus-llm\[evaluate\]'"):
        check_lm_eval()


def test_the_command(run: Any, folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    arguments = (run.path, "--tasks", f"{folder / 'choose.yaml'},perplex", "--include", folder, "--limit", 2)
    record = as_json(*arguments, "--out", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == record
    assert "text" not in record
    metrics = [Metric(**one) for one in record["tasks"]]
    assert [(one.task, one.metric) for one in metrics] == [
        ("choose", "acc"),
        ("perplex", "word_perplexity"),
        ("perplex", "bits_per_byte"),
    ]
    assert {one.num_samples for one in metrics} == {2}
    shown = evaluate(*arguments)
    assert f"{metrics[2].value:.4f}" in shown
    with pytest.raises(ConfigError, match="has no chat template"):
        evaluate(*arguments, "--chat")
