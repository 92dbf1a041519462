"""Out and in again: every bit of every weight, for other readers too."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from colossus.checkpoint import load
from colossus.checkpoint.continued import continued, with_warmup
from colossus.checkpoint.hugging_face import export_run, import_run, open_directory, write_directory
from colossus.data import Tokenizer
from colossus.errors import CheckpointError, ConfigError
from colossus.generate import Sampling, generate, generate_tokens, load_model
from colossus.generate.generate import prompt_ids
from colossus.spec.config import override
from colossus.spec.model import NgramSpec
from colossus.zoo.hugging_face import architecture_of

from .hugging_face_models import CONFIGS, make_run, model, read_all, weights
from .states import assert_same


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    spec = model(kind)
    tensors = weights(spec)
    written = write_directory(spec, tensors.__getitem__, tmp_path / kind)
    assert written.num_files == 1
    directory = open_directory(tmp_path / kind, name=spec.name)
    assert directory.model == spec.model_copy(update={"zero_init_outputs": False})
    assert directory.num_bytes == written.num_bytes == 4 * spec.num_params()
    assert_same(read_all(directory), tensors)


@pytest.mark.parametrize("max_bytes", [1, 3_000, 20_000, 10**9])
def test_any_number_of_shards(max_bytes: int, tmp_path: Path) -> None:
    spec = model("mixtral")
    tensors = weights(spec)
    path = tmp_path / "out"
    written = write_directory(spec, tensors.__getitem__, path, max_shard_bytes=max_bytes)
    table = list(architecture_of(spec).tensors(spec))
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == written.num_files
    assert (written.num_files == len(table)) == (max_bytes == 1)
    stored = {}
    for file in files:
        content = load_file(file)
        assert len(content) == 1 or sum(t.nbytes for t in content.values()) <= max_bytes
        assert not stored.keys() & content.keys()
        stored |= content
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert {tensor.name: tensor.shape for tensor in table} == {n: tuple(t.shape) for n, t in stored.items()}
    if written.num_files > 1:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
        assert set(index["weight_map"]) == set(stored)
    assert_same(read_all(open_directory(path)), tensors)
    # Without its index, the same: every file of the directory is looked at.
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    assert_same(read_all(open_directory(path)), tensors)


def test_bfloat16_is_rounded_once_and_stays(tmp_path: Path) -> None:
    spec = model("deepseek")
    tensors = weights(spec)
    write_directory(spec, tensors.__getitem__, tmp_path / "a", dtype="bfloat16")
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    first = read_all(open_directory(tmp_path / "a"))
    for parameter in spec.parameters():
        exact = tensors[parameter.name]
        expected = exact if parameter.role == "balance" else exact.bfloat16().float()
        assert torch.equal(first[parameter.name], expected), parameter.name
    kept = dict(open_directory(tmp_path / "a").parameters(dtype=None))
    assert kept["embedding.weight"].dtype == torch.bfloat16
    write_directory(spec, first.__getitem__, tmp_path / "b", dtype="bfloat16")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_loads_what_was_written(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = model(kind)
    run = make_run(tmp_path / "runs", spec, weights(spec))
    export_run(run, tmp_path / "out", max_shard_bytes=30_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    # What they write is theirs to name; read by us, it is the same model.
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(read_all(open_directory(tmp_path / "theirs")), weights(spec))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Tokenizer.load(run.tokenizer_path)
    text = "some words, and\nmore – words"
    assert tokenizer(text)["input_ids"] == [ours.end_of_document, *ours.encode(text).tolist()]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == ours.end_of_document
    marks = theirs.generation_config
    assert marks.bos_token_id == marks.eos_token_id == marks.pad_token_id == ours.end_of_document
    assert theirs.config.pad_token_id is None, "its row of the embedding would get no gradients"


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_transformers_writes_the_text_that_we_write(kind: str, tmp_path: Path) -> None:
    """The run, the directory, and the run that is made from it: the same ids before the prompt and after it."""
    transformers = pytest.importorskip("transformers")
    spec = model(kind).model_copy(update={"vocab_size": 280})
    run = make_run(tmp_path / "runs", spec, weights(spec))
    assert Tokenizer.load(run.tokenizer_path).vocab_size <= 280
    export_run(run, tmp_path / "out")
    source = open_directory(tmp_path / "out")
    imported = import_run(source, continued(source.model), runs_directory=tmp_path / "runs", name="again")
    loaded = [load_model(path, tmp_path / "runs") for path in (run.path, tmp_path / "out", imported.path)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for prompt in ("some words, and", "more", "é\n "):
        before = tokenizer(prompt, return_tensors="pt")
        length = before["input_ids"].shape[1]
        out = theirs.generate(**before, max_new_tokens=12, do_sample=False)[0].tolist()
        for one in loaded:
            ids = prompt_ids(one.tokenizer, prompt, one.borders)
            assert ids == out[:length]
            sampling = Sampling(temperature=0, max_tokens=12)
            after = list(islice(generate_tokens(one.model, ids, sampling), len(out) - length))
            assert after == out[length:]
            text = "".join(generate(one.model, one.tokenizer, prompt, sampling, borders=one.borders))
            assert text == tokenizer.decode(out[length:], skip_special_tokens=True)


def test_what_a_model_expects_before_a_text_stays(tmp_path: Path) -> None:
    """Of a tokenizer that puts a mark before texts: END where a model is trained on it here, the mark where it came
    with a model."""
    transformers = pytest.importorskip("transformers")
    spec = model("llama")
    run = make_run(tmp_path / "runs", spec, weights(spec))
    file = run.tokenizer_path / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(file))
    library.add_special_tokens(["<s>"])
    mark, end = library.token_to_id("<s>"), library.token_to_id("<|endoftext|>")
    library.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing(
                single="<s> $A <|endoftext|>",
                pair="<s> $A <|endoftext|> $B",
                special_tokens=[("<s>", mark), ("<|endoftext|>", end)],
            ),
        ]
    )
    library.save(str(file))
    plain = library.encode("some words", add_special_tokens=False).ids

    def opened(directory: Path) -> list[list[int]]:
        theirs = transformers.AutoTokenizer.from_pretrained(directory)("some words")["input_ids"]
        ours = load_model(directory, tmp_path)
        return [theirs, prompt_ids(ours.tokenizer, "some words", ours.borders)]

    export_run(run, tmp_path / "ours")
    assert opened(tmp_path / "ours") == [[end, *plain]] * 2
    described = json.loads((tmp_path / "ours/tokenizer.json").read_text())["post_processor"]
    assert [one["type"] for one in described["processors"]] == ["ByteLevel", "TemplateProcessing"]
    # The same weights with the tokenizer as its makers wrote it.
    shutil.copytree(tmp_path / "ours", tmp_path / "other")
    shutil.copyfile(file, tmp_path / "other/tokenizer.json")
    (tmp_path / "other/tokenizer_config.json").unlink()
    source = open_directory(tmp_path / "other")
    imported = import_run(source, continued(source.model), runs_directory=tmp_path / "runs", name="x")
    export_run(imported, tmp_path / "again")
    for directory in ("other", "again"):
        theirs, ours = opened(tmp_path / directory)
        assert theirs == [mark, *plain, end]
        assert ours == [mark, *plain]
    one = load_model(imported.path, tmp_path)
    assert one.borders.opening == (mark,)
    assert (tmp_path / "again/tokenizer.json").read_bytes() == file.read_bytes()
    assert "unchanged" in (tmp_path / "again/README.md").read_text()
    assert "give a prompt as it is" in (tmp_path / "ours/README.md").read_text()


def test_a_run_goes_out_and_comes_in_as_the_same_weights(tmp_path: Path) -> None:
    spec = model("llama")
    tensors = weights(spec)
    run = make_run(tmp_path / "runs", spec, tensors)
    exported = export_run(run, tmp_path / "out")
    assert (exported.step, exported.rejected) == (7, ())
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\n")
    assert "7 steps" in card
    assert "colossus train 'it'\"'\"'s mine.toml'" in card
    assert f"{spec.num_params():,}" in card
    source = open_directory(tmp_path / "out", name="again")
    config = override(continued(source.model), ["budget=40 steps"])
    imported = import_run(source, with_warmup(config), runs_directory=tmp_path / "runs", name="again")
    assert (imported.path / "started_from.txt").read_text() == "out\n"
    read_back = imported.config()
    assert read_back.plan is None
    assert read_back.schedule.warmup_steps == 4
    assert read_back.data.tokenizer.path == str(imported.tokenizer_path.resolve() / "tokenizer.json")
    kept, before = Tokenizer.load(imported.tokenizer_path), Tokenizer.load(run.tokenizer_path)
    assert kept.encode("some words – é").tolist() == before.encode("some words – é").tolist()
    assert (kept.opening, before.opening) == ((before.end_of_document,), ())
    assert load_model(imported.path, tmp_path).borders == load_model(run.path, tmp_path).borders
    checkpoint = imported.checkpoints_path / "step-00000000"
    loaded = load(checkpoint, expect=read_back.model)
    assert loaded.facts["progress"]["steps"] == 0
    assert_same({n.removeprefix("model."): t for n, t in loaded.tensors.items()}, tensors)
    export_run(imported, tmp_path / "second")
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    assert "the weights of `out`" in (tmp_path / "second/README.md").read_text()


def test_export_takes_the_newest_good_checkpoint_or_the_one_asked_for(tmp_path: Path) -> None:
    spec = model("llama")
    run = make_run(tmp_path, spec, weights(spec), step=3)
    newer = {name: tensor + 1 for name, tensor in weights(spec).items()}
    newest = make_run(tmp_path, spec, newer, step=5).checkpoints_path / "step-00000005"
    target = newest.rename(run.checkpoints_path / newest.name)
    export_run(run, tmp_path / "3", checkpoint=3)
    assert_same(read_all(open_directory(tmp_path / "3")), weights(spec))
    export_run(run, tmp_path / "5")
    assert_same(read_all(open_directory(tmp_path / "5")), newer)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; .*: 3, 5"):
        export_run(run, tmp_path / "4", checkpoint=4)
    payload = target / "model-00000.safetensors"
    payload.write_bytes(payload.read_bytes()[:-4] + b"\0\1\2\3")
    exported = export_run(run, tmp_path / "older")
    assert exported.step == 3
    assert "damaged" in exported.rejected[0].reason


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    spec = model("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    for name, sentence in (("full", "not empty"), ("full/mine.txt", "not a directory")):
        with pytest.raises(ConfigError, match=sentence):
            write_directory(spec, weights(spec).__getitem__, tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    write_directory(spec, weights(spec).__getitem__, tmp_path / "empty")
    unheld = spec.model_copy(update={"ngrams": NgramSpec(orders=(2,), num_rows=31)})
    run = make_run(tmp_path / "runs", unheld, weights(unheld))
    with pytest.raises(ConfigError, match="n-gram"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    spec = model("mixtral")
    tensors = weights(spec)
    tensors["layers.1.mlp.experts.up.weight"][2, 3, 4] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.\S*experts\.2\.w3\.weight .* 1 elements"):
        write_directory(spec, tensors.__getitem__, tmp_path / "out", max_shard_bytes=5000)
    assert list(tmp_path.iterdir()) == []
    tensors["layers.1.mlp.experts.up.weight"][2, 3, 4] = 3.4e38  # a float32, beyond bfloat16's range
    write_directory(spec, tensors.__getitem__, tmp_path / "float32")
    with pytest.raises(CheckpointError, match="not finite as bfloat16"):
        write_directory(spec, tensors.__getitem__, tmp_path / "bfloat16", dtype="bfloat16")


def test_import_refuses_another_model_and_leaves_nothing(tmp_path: Path) -> None:
    spec = model("llama")
    export_run(make_run(tmp_path / "a", spec, weights(spec)), tmp_path / "out")
    source = open_directory(tmp_path / "out", name="x")
    runs = tmp_path / "runs"
    narrower = override(continued(source.model), ["model.mlp.intermediate_size=20"])
    with pytest.raises(ConfigError, match=r"\[16, 20\] and is \[16, 24\].*Leave model"):
        import_run(source, narrower, runs_directory=runs, name="x")
    longer = override(continued(source.model), ["model.context_tokens=128"])
    assert import_run(source, longer, runs_directory=runs, name="x").config().model.context_tokens == 128
    (tmp_path / "out/tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="--tokenizer"):
        import_run(open_directory(tmp_path / "out"), longer, runs_directory=runs, name="y")
    bad = load_file(tmp_path / "out/model.safetensors")
    bad["model.norm.weight"][3] = torch.inf
    save_file(bad, tmp_path / "out/model.safetensors")
    tokenizer = Path(source.path).parent / "a/llama-001/tokenizer/tokenizer.json"
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* 1 elements of 16"):
        import_run(
            open_directory(tmp_path / "out"), longer, runs_directory=runs, name="y", tokenizer=tokenizer
        )
    assert sorted(path.name for path in runs.iterdir()) == ["x-001"]


def test_what_came_with_a_tokenizer_stays_and_links_are_not_followed(tmp_path: Path) -> None:
    spec = model("llama")
    export_run(make_run(tmp_path / "runs", spec, weights(spec)), tmp_path / "out")
    (tmp_path / "out/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "out/generation_config.json").write_text(
        '{"eos_token_id": [0, 5], "bos_token_id": 3, "top_p": 0.9}'
    )
    marks = {"eos_token": "<|endoftext|>", "auto_map": {"AutoTokenizer": "code.Class"}, "x": 1}
    (tmp_path / "out/tokenizer_config.json").write_text(json.dumps(marks))
    source = open_directory(tmp_path / "out")
    run = import_run(source, continued(source.model), runs_directory=tmp_path / "runs", name="x")
    export_run(run, tmp_path / "again")
    for name in ("chat_template.jinja", "generation_config.json"):
        before, after = (tmp_path / folder / name for folder in ("out", "again"))
        texts = [file.read_text() for file in (before, after)]
        assert texts[0] == texts[1] or json.loads(texts[0]) == json.loads(texts[1])
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, [0, 5])
    kept = json.loads((tmp_path / "again/tokenizer_config.json").read_text())
    assert kept == {"eos_token": "<|endoftext|>", "x": 1}
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "out/special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside the directory"):
        import_run(source, continued(source.model), runs_directory=tmp_path / "runs", name="y")
    assert not (tmp_path / "runs/y-001").exists()


def test_a_sentencepiece_model_goes_out_and_in(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    spec = model("llama")
    run = make_run(tmp_path / "runs", spec, weights(spec))
    (run.tokenizer_path / "tokenizer.json").unlink()
    texts = [
        "some words, and more words",
        "other words with nothing in them",
        "0123456789 and signs: ()[]",
    ] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=290,
        byte_fallback=True,
        model_type="bpe",
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").rename(run.tokenizer_path / "tokenizer.model")
    export_run(run, tmp_path / "out")
    source = open_directory(tmp_path / "out")
    imported = import_run(source, continued(source.model), runs_directory=tmp_path / "runs", name="x")
    ours = Tokenizer.load(imported.tokenizer_path)
    assert ours.fingerprint == Tokenizer.load(run.tokenizer_path).fingerprint
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    end = ours.end_of_document
    assert theirs("some words (é)")["input_ids"] == [end, *ours.encode("some words (é)").tolist()]
    assert theirs.eos_token_id == end
    assert ours.opening == (end,)
    assert Tokenizer.load(run.tokenizer_path).opening != (end,)
    for path in (run.path, tmp_path / "out", imported.path):
        assert load_model(path, tmp_path).borders.opening == (end,)
    export_run(imported, tmp_path / "second")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
